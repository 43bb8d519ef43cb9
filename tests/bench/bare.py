"""The yardstick: llama.cpp's C API and nothing else. python -m tests.bench.bare MODEL --threads 2 ...

One JSON command a line on stdin, one JSON answer a line on stdout. What is timed is llama_decode and
llama_sampler_sample, greedy, over a batch that was made before; tokens are never turned into text.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp.llama_cpp as api


class Bare:
    """A model with one context, its settings those of osync's engine."""

    def __init__(self, model: str, threads: int, context_length: int, sequences: int, n_batch: int) -> None:
        self._log = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context_length * sequences, sequences
        params.n_batch = params.n_ubatch = self.n_batch = n_batch
        params.n_threads = params.n_threads_batch = threads
        params.n_outputs_max = max(sequences, min(64, n_batch))
        params.kv_unified = params.no_perf = True
        self.context = api.llama_init_from_model(self.model, params)
        self.memory = api.llama_get_memory(self.context)
        self.vocabulary = api.llama_model_get_vocab(self.model)
        self.batch = api.llama_batch_init(n_batch, 0, 1)
        self.sampler = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(self.sampler, api.llama_sampler_init_greedy())

    def row(self, index: int, token: int, position: int, sequence: int, logits: int) -> None:
        """Fill one row of the batch."""
        batch = self.batch
        batch.token[index], batch.pos[index], batch.logits[index] = token, position, logits
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence

    def decode(self) -> None:
        """Evaluate the batch."""
        if code := api.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode: {code}")

    def fill(self, tokens: list[int], sequence: int) -> int:
        """Evaluate a prompt in batches as large as they may be; return the first token of its answer."""
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            for index, token in enumerate(part):
                self.row(index, token, start + index, sequence, int(start + index == len(tokens) - 1))
            self.batch.n_tokens = len(part)
            self.decode()
        return int(api.llama_sampler_sample(self.sampler, self.context, -1))

    def do_tokenize(self, text: str) -> list[int]:
        """Return a text's tokens."""
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 2))()
        count = api.llama_tokenize(self.vocabulary, raw, len(raw), buffer, len(buffer), True, True)
        return list(buffer[:count])

    def do_kv(self) -> int:
        """Return the bytes that one token takes in an f16 KV cache."""
        heads = api.llama_model_n_head_kv(self.model)
        width = self.number("attention.key_length") + self.number("attention.value_length")
        width = width or 2 * api.llama_model_n_embd(self.model) // api.llama_model_n_head(self.model)
        return int(2 * width * heads * api.llama_model_n_layer(self.model))

    def number(self, key: str) -> int:
        """Return a number of the file's metadata, 0 where absent."""
        buffer = ctypes.create_string_buffer(64)
        api.llama_model_meta_val_str(self.model, b"general.architecture", buffer, 64)
        length = api.llama_model_meta_val_str(self.model, buffer.value + b"." + key.encode(), buffer, 64)
        return int(buffer.value) if length > 0 else 0

    def do_prompt(self, tokens: list[int]) -> float:
        """Return the seconds from a prompt to the first token."""
        api.llama_memory_clear(self.memory, False)
        began = time.perf_counter()
        self.fill(tokens, 0)
        return time.perf_counter() - began

    def do_answer(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Return tokens/s of all prompts' answers in one batch, from the first token of each on, and the tokens."""
        api.llama_memory_clear(self.memory, False)
        last = [self.fill(prompt, sequence) for sequence, prompt in enumerate(prompts)]
        positions = [len(prompt) for prompt in prompts]
        answers = [[token] for token in last]
        rows = range(len(prompts))
        self.batch.n_tokens = len(prompts)
        for index in rows:
            self.row(index, 0, 0, index, 1)
        token, position = self.batch.token, self.batch.pos
        began = time.perf_counter()
        for step in range(count - 1):
            for index in rows:
                token[index], position[index] = last[index], positions[index] + step
            self.decode()
            for index in rows:
                last[index] = api.llama_sampler_sample(self.sampler, self.context, index)
                answers[index].append(last[index])
        seconds = time.perf_counter() - began
        return {"rate": len(prompts) * (count - 1) / seconds, "answers": answers}


def main() -> None:
    """Obey until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    for name, default in (("threads", 2), ("context-length", 2048), ("sequences", 8), ("batch", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    bare = Bare(a.model, a.threads, a.context_length, a.sequences, a.batch)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(bare, "do_" + command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
