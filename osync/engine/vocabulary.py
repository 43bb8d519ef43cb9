"""Text to tokens and back."""

from __future__ import annotations

import codecs
import ctypes

from osync.engine.llama import Model
from osync.engine.runs import cut_runs
from osync.errors import BadRequest

_MAX_TEXT = 1 << 30
"""Bytes of one text; llama.cpp counts in 32 bits."""


class Vocabulary:
    """A model's vocabulary; usable from any thread as long as the model is loaded."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._api = api = model.api
        self._vocab = vocab = model.vocabulary_pointer
        self.size = model.vocabulary_size
        self.bos: int = api.llama_vocab_bos(vocab)
        self.eos: int = api.llama_vocab_eos(vocab)
        self.bos_text = self._text(self.bos)
        self.eos_text = self._text(self.eos)
        self.adds_bos = bool(api.llama_vocab_get_add_bos(vocab))
        self.adds_eos = bool(api.llama_vocab_get_add_eos(vocab))
        self._is_byte_pairs = api.llama_vocab_type(vocab) == api.LLAMA_VOCAB_TYPE_BPE
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._ends: dict[int, bool] = {}

    def _text(self, token: int) -> str:
        if not 0 <= token < self.size:
            return ""
        text: bytes | None = self._api.llama_vocab_get_text(self._vocab, token)
        return (text or b"").decode("utf-8", "replace")

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the text's tokens; `add_special` adds BOS and EOS where the model wants them."""
        pieces = cut_runs(text) if self._is_byte_pairs else [text]
        if len(pieces) == 1:
            return self._tokenize(text, add_special, parse_special)
        tokens = [token for piece in pieces for token in self._tokenize(piece, False, parse_special)]
        begin = [self.bos] if add_special and self.adds_bos else []
        return begin + tokens + ([self.eos] if add_special and self.adds_eos else [])

    def _tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        raw = text.encode("utf-8", "replace")
        if len(raw) > _MAX_TEXT:
            raise BadRequest("the text is too long")
        room = len(raw) + 2  # a token is a byte at least; BOS and EOS
        with self._model.borrow():
            while True:
                buffer = (ctypes.c_int32 * room)()
                count = self._api.llama_tokenize(self._vocab, raw, len(raw), buffer, room, add_special, parse_special)
                if count >= 0:
                    return buffer[:count]
                if count == -(1 << 31) or -count <= room:
                    raise BadRequest("the text cannot be tokenized")
                room = -count

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return a token's bytes; control tokens have none unless `special`."""
        key = (token, special)
        if (known := self._pieces.get(key)) is not None:
            return known
        if not 0 <= token < self.size:
            raise BadRequest(f"token {token} is not in the vocabulary of {self.size}")
        room = 64
        with self._model.borrow():
            while True:
                buffer = ctypes.create_string_buffer(room)
                count = self._api.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
                if count >= 0:
                    break
                room = -count
        self._pieces[key] = piece = buffer.raw[:count]
        return piece

    def is_end(self, token: int) -> bool:
        """Tell whether the token ends an answer."""
        if (known := self._ends.get(token)) is not None:
            return known
        if not 0 <= token < self.size:
            return False
        with self._model.borrow():
            self._ends[token] = end = bool(self._api.llama_vocab_is_eog(self._vocab, token))
        return end

    def text(self, tokens: list[int], special: bool = False) -> str:
        """Return the text of whole tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.piece(token, special) for token in tokens).decode("utf-8", "replace")


class TextDecoder:
    """Bytes to text piecewise: a character comes out whole, or as U+FFFD once it can never be."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """Return what can be said for certain by now."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return what is left at the end."""
        return self._decoder.decode(b"", final=True)
