"""A stage of some of a model's layers: tokens or activations in, activations or sampled tokens out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from osync.engine.context import ContextStage
from osync.engine.cutting import ARCHITECTURES
from osync.engine.devices import LoadSettings
from osync.engine.frame import Frame, Outcome, Rows
from osync.engine.gguf import TENSOR_TYPES, GGUFHeader, read_header
from osync.engine.llama import ContextSettings, Model
from osync.engine.stage import load_stage
from osync.engine.tap import Tap
from osync.engine.thread import EngineThread
from osync.engine.token_table import TokenTable
from osync.errors import BadRequest, ModelError, ModelUnusable, NotSupported

_ANY_TOKEN = (1 << 31) - 1
"""A stage in the middle neither looks tokens up nor samples them."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which layers of a model a slice's file has, as the file says."""

    first: int
    last: int
    layers: int
    width: int

    @property
    def is_first(self) -> bool:
        """True if it takes tokens."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """True if it samples."""
        return self.last == self.layers


def read_part(header: GGUFHeader) -> Part:
    """Return which part of a model a file is; one that is no slice is all of it."""
    count = header.block_count
    first, layers = header.integer("osync.slice.first"), header.integer("osync.slice.layers", count)
    last = header.integer("osync.slice.last", count)
    if not 0 <= first < last <= layers or last - first != count or header.embedding_length < 1:
        raise ModelUnusable(f"the slice says it has layers {first} to {last} of {layers}, and has {count}")
    return Part(first, last, layers, header.embedding_length)


class LayerStage(ContextStage):
    """Layers [first, last) of a model in this process: a pipeline's first, middle or last stage, or all of it."""

    def __init__(
        self, thread: EngineThread, model: Model, settings: ContextSettings, part: Part, table: TokenTable | None
    ) -> None:
        """Make the context and evaluate one row; runs in `thread`. Raises NotSupported where the layers' output
        cannot be read."""
        self.part = part
        self._table = table
        self._takes_rows = not (part.is_first and part.is_last)
        super().__init__(
            thread,
            model,
            settings,
            tap=None if part.is_last else Tap(part.last - part.first - 1),
            width=part.width if self._takes_rows else 0,
            vocabulary_size=table.rows if table else None if part.is_last else _ANY_TOKEN,
        )
        self._given: memoryview | None = None
        self._out: list[bytearray] = []
        try:
            self._try()
        except BaseException:
            self._free_context()
            raise

    @classmethod
    async def load(
        cls,
        path: Path,
        plan: Callable[[Model, Part], ContextSettings],
        *,
        settings: LoadSettings = LoadSettings(),  # noqa: B008 (frozen)
        progress: Callable[[float], None] | None = None,
    ) -> LayerStage:
        """Load a slice's file and make the context that `plan` asks for. Cancelled, it ends and frees all."""

        def make(thread: EngineThread, model: Model) -> LayerStage:
            header = read_header(path)
            part = read_part(header)
            table = _table(path, header) if part.is_first and not part.is_last else None
            try:
                return cls(thread, model, plan(model, part), part, table)
            except BaseException:
                if table:
                    table.close()
                raise

        return await load_stage(path, make, settings=settings, progress=progress)

    async def evaluate(
        self, frame: Frame, activations: memoryview | bytes | bytearray | None = None
    ) -> tuple[Outcome | None, memoryview | None]:
        """Apply operations and evaluate rows: of the frame's tokens in the first stage, else of `activations`, f32,
        as many as the frame has tokens.

        Gives an outcome from the last stage, and from all where rows are undone; else the rows' activations, which
        stay as they are. Raises as `Stage.evaluate` does.
        """
        return await self._begin(lambda: self.evaluate_here(frame, activations))

    def evaluate_here(
        self, frame: Frame, activations: memoryview | bytes | bytearray | None = None
    ) -> tuple[Outcome | None, memoryview | None]:
        """The same in the stage's own thread."""
        given = None if activations is None else memoryview(activations).cast("B")
        size = sum(len(rows.tokens) for rows in frame.rows) * self.part.width * 4
        if not self.part.is_first and (0 if given is None else given.nbytes) != size:
            raise BadRequest(f"{0 if given is None else given.nbytes} bytes of activations came for {size}")
        self._given, self._out = given, []
        try:
            outcome = self._evaluate(frame)
        finally:
            out, self._out, self._given = self._out, [], None
        if self.part.is_last or outcome.undone is not None:
            return outcome, None
        return None, memoryview(out[0] if len(out) == 1 else b"".join(out))

    def _decode(self, rows: tuple[Rows, ...]) -> int:
        if self._takes_rows:
            self._put(rows)
        if self._tap is None:
            return super()._decode(rows)
        self._tap.clear()
        code = super()._decode(rows)
        if code == 0:
            try:
                self._out.append(self._tap.take(self._batch.count * self.part.width * 4))
            except ModelError:
                self._undo(rows, 2)
                raise
        return code

    def _put(self, rows: tuple[Rows, ...]) -> None:
        """Write what goes into the first layer into the batch."""
        import numpy as np

        target = self._batch.activations
        if self._table is not None:
            self._table.fill([token for one in rows for token in one.tokens], target)
        elif self._given is not None:
            size = sum(len(one.tokens) for one in rows) * self.part.width * 4
            # What is no number would have the sampler abort the process.
            if not np.isfinite(np.frombuffer(self._given[:size], np.float32)).all():
                raise BadRequest("activations are no finite numbers")
            target[:size], self._given = self._given[:size], self._given[size:]

    def _try(self) -> None:
        """Evaluate one row and forget it: shows whether the graph can be tapped, and warms it up."""
        if self._takes_rows:
            self._batch.activations[: self.part.width * 4] = bytes(self.part.width * 4)
        if self._tap is not None:
            self._tap.clear()
        code = super()._decode((Rows(0, 0, (0,), sample=1),))
        if code:
            self._undo((Rows(0, 0, (0,)),), code)
        if self._tap is not None:
            try:
                self._tap.take(self.part.width * 4)
            except ModelError as error:
                name = self.model.metadata("general.architecture")
                raise NotSupported(f"llama.cpp does not show what leaves a layer of the architecture {name}") from error
        self._cut(0, 0)

    def free(self) -> None:
        """Free context, model and table; runs in the thread."""
        super().free()
        if self._table is not None:
            self._table.close()


def _table(path: Path, header: GGUFHeader) -> TokenTable:
    def integer(name: str) -> int:
        return header.integer(f"osync.embedding.{name}", -1)

    kind, rows, offset, width = integer("type"), integer("rows"), integer("offset"), header.embedding_length
    if kind not in TENSOR_TYPES or rows < 1 or offset < header.header_bytes or width % TENSOR_TYPES[kind][1]:
        raise ModelUnusable(f"{path.name} does not say where its embedding of tokens is")
    scaled = ARCHITECTURES[header.architecture].scales_tokens
    return TokenTable(path, kind=kind, offset=offset, rows=rows, width=width, scaled=scaled)
