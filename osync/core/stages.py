"""What coordinators and shards say to each other about a pipeline's stages. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """How each stage of a pipeline is loaded; the same on all of them. Lengths in tokens."""

    context_length: int
    """Of one sequence."""
    sequences: int = 1
    cells: int = 0
    """Of all sequences together; 0: context_length x sequences."""
    n_batch: int = 512
    threads: int = 0
    """0: the shard's own setting."""
    flash_attention: str = "auto"
    kv_type: str = "f16"
    unified: bool = True
    deterministic: bool = False
    """Waiting frames are never merged."""


@dataclass(frozen=True, slots=True)
class SlicePiece:
    """A run of bytes of a slice: copied from the whole model's file, given, or (with neither) zeros."""

    size: int
    source: int | None = None
    data: bytes = b""
    tensor: str = ""
    """The source's tensor that it holds whole; "" for all else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOrder:
    """Asks a shard to load layers [first, last) of a model, and to hold them."""

    pipeline: str
    owner: str
    model: str
    digest: str
    """Of the whole GGUF file, or of the Ollama manifest whose weights it is."""
    size: int
    first: int
    last: int
    layers: int
    settings: StageSettings
    sources: tuple[str, ...] = field(default=(), compare=False)
    """host:port of daemons that have the file."""
    pieces: tuple[SlicePiece, ...] = field(default=(), compare=False)
    """In order, the whole file of the slice: so that only the coordinator reads the model's header."""
    weight_bytes: int = 0
    kv_bytes: int = 0
    standby: bool = field(default=False, compare=False)
    """Held in reserve: given up where a stage that is used needs the memory."""

    @property
    def read_bytes(self) -> int:
        """Weights that the evaluation of a row reads: of an embedding of tokens that is only looked up, one row."""
        skipped = "token_embd.weight" if self.is_first and not self.is_last else ""
        return sum(piece.size for piece in self.pieces if piece.tensor and piece.tensor != skipped)

    @property
    def is_first(self) -> bool:
        """True if it takes tokens."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """True if it samples."""
        return self.last == self.layers


class StageState(Enum):
    """Where a held stage is."""

    WAITING = 1
    FETCHING = 2
    LOADING = 3
    READY = 4
    FAILED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What a shard says of a stage that it holds: at every change, and every second. Sizes in bytes, times in s."""

    state: StageState
    error: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_fetched: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    frames: int = 0
    rows: int = 0
    busy_s: float = 0.0
    wire_s: float = 0.0
    queued: int = 0
    taken: int = 0
    """Number of the last frame that it took in the newest epoch."""
    done: int = 0
    """Number of the last frame that it passed on."""
    engine: str = ""
    embedding_length: int = 0
    vocabulary_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What a stream of frames is for: which stage of which pipeline, and where all its stages are."""

    pipeline: str
    epoch: int
    stage: int
    addresses: tuple[str, ...]
    wants_outcomes: bool = False
    """From the coordinator to the last stage: nothing goes up, outcomes come down."""
    returns_tokens: bool = False
    """From the last stage to the first: outcomes go up."""
    activation_dtype: str = "f32"
    in_flight: int = 16
    """Frames that may be unacknowledged."""
    cuts: tuple[int, ...] = ()
    """Stage i has layers [cuts[i], cuts[i + 1]); empty where each shard holds one stage of the pipeline."""

    @property
    def is_last(self) -> bool:
        """True if no stage comes after it."""
        return self.stage == len(self.addresses) - 1

    @property
    def layers(self) -> tuple[int, int] | None:
        """First layer and the one after the last of the stage that it is for; None where it does not say."""
        return (self.cuts[self.stage], self.cuts[self.stage + 1]) if self.cuts else None
