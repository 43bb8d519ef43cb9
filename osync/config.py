"""One settings object. Precedence: flag, environment, configuration file, default.

Every setting is one field of `Settings`, with its flag, variables and meaning in its metadata: the
command line, `--print-config` and the documentation are made from this table alone.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osync.errors import ConfigError

ROLES = ("proxy", "node", "shard")
QUANTIZATIONS = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16",
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
)  # fmt: skip
"""What `--quantize` may ask for."""


def setting(
    default: Any,
    doc: str,
    *,
    flag: str = "",
    env: tuple[str, ...] = (),
    split: bool = False,
    metavar: str = "",
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a setting; `flag` and the first variable default to the field's own name."""
    meta = {"doc": doc, "flag": flag, "env": env, "split": split, "metavar": metavar, "choices": choices}
    return field(default=default, metadata=meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Effective settings of one daemon, checked. Durations in seconds, sizes in bytes."""

    role: tuple[str, ...] = setting(
        ("proxy", "node"), "role of this daemon, repeatable", env=("OSYNC_ROLE",), split=True, choices=ROLES
    )
    host: str = setting("127.0.0.1", "address that all listeners bind", env=("OSYNC_HOST",))
    port: int = setting(8000, "HTTP port of the proxy role", env=("OSYNC_PORT", "OLOL_PORT"))
    grpc_port: int = setting(50051, "gRPC port of all roles; 0 picks a free one", env=("OSYNC_GRPC_PORT",))
    servers: tuple[str, ...] = setting(
        (), "static peers host:port, comma-separated or repeated", env=("OLLAMA_SERVERS",), split=True
    )
    rpc_servers: tuple[str, ...] = setting(
        (), "the same list under the original's name", env=("OSYNC_RPC_SERVERS",), split=True
    )
    backend: str = setting(
        "auto",
        "node role: ollama, engine, or auto: ollama where it answers, else engine",
        env=("OSYNC_BACKEND",),
        choices=("auto", "ollama", "engine"),
    )
    ollama_host: str = setting("http://127.0.0.1:11434", "the node's Ollama", env=("OLLAMA_HOST",))
    models_dir: tuple[Path, ...] = setting(
        (),
        "GGUF files or an Ollama store, repeatable; default: Ollama's own store",
        env=("OSYNC_MODELS", "OLLAMA_MODELS"),
        split=True,
    )
    state_dir: Path | None = setting(  # noqa: RUF009 (a field, though ruff cannot see it)
        None, "identity and caches; default: the platform's", env=("OSYNC_STATE_DIR",)
    )
    device: str = setting(
        "auto",
        "engine: auto (what is there), cpu, cuda, metal, vulkan",
        env=("OSYNC_DEVICE", "OLLAMA_LLM_LIBRARY"),
        choices=("auto", "cpu", "cuda", "metal", "vulkan"),
    )
    main_gpu: int = setting(-1, "engine: the one GPU to use, by its number; -1: as fits", env=("OSYNC_MAIN_GPU",))
    num_gpu: int = setting(-1, "engine: layers on the GPU; -1: as many as fit", env=("OSYNC_NUM_GPU",))
    gpu_overhead: str = setting("0", "engine: memory of each GPU to leave free", env=("OLLAMA_GPU_OVERHEAD",))
    sched_spread: bool = setting(False, "engine: over all GPUs, also what fits on one", env=("OLLAMA_SCHED_SPREAD",))
    vulkan: bool = setting(True, "engine: may device auto be Vulkan", env=("OLLAMA_VULKAN",))
    igpu: str = setting(
        "auto",
        "engine: integrated GPUs: auto (where there is no other), on, off",
        env=("OLLAMA_IGPU_ENABLE",),
        choices=("auto", "on", "off"),
    )
    flash_attention: str = setting(
        "auto", "engine: auto, on, off", env=("OLLAMA_FLASH_ATTENTION",), choices=("auto", "on", "off")
    )
    kv_cache_type: str = setting(
        "f16",
        "engine: f16, q8_0 or q4_0; quantized values need flash attention",
        env=("OLLAMA_KV_CACHE_TYPE",),
        choices=("f32", "f16", "q8_0", "q4_0"),
    )
    quantize: str = setting(
        "",
        "engine: quantization to prefer, such as q4_0 or q4_k_m; made of an f16, bf16 or f32 file where none fits",
        env=("OLLAMA_QUANTIZE",),
    )
    context_window: int = setting(
        0,
        "engine: context length; 0: the model's, 8192 at most",
        env=("OLLAMA_CONTEXT_WINDOW", "OLLAMA_CONTEXT_LENGTH"),
    )
    threads: int = setting(0, "engine: threads; 0: as many as cores, from 8 on one fewer", env=("OSYNC_THREADS",))
    numa: str = setting(
        "off",
        "engine: off, distribute, isolate, numactl",
        env=("OLLAMA_NUMA",),
        choices=("off", "distribute", "isolate", "numactl"),
    )
    memory_lock: bool = setting(False, "engine: keep models from being swapped out", env=("OLLAMA_MEMORY_LOCK",))
    memory: str = setting("80%", "engine: memory for models: 80% of what is free, 12GiB, bytes", env=("OSYNC_MEMORY",))
    parallel: int = setting(4, "engine: sequences at once per model", env=("OLLAMA_NUM_PARALLEL",))
    max_queue: int = setting(512, "engine: requests that may wait", env=("OLLAMA_MAX_QUEUE",))
    max_loaded_models: int = setting(0, "engine: models in memory; 0: three", env=("OLLAMA_MAX_LOADED_MODELS",))
    keep_alive: str = setting("5m", "engine: how long an idle model stays loaded", env=("OLLAMA_KEEP_ALIVE",))
    load_timeout: str = setting("5m", "engine: how long a load may take", env=("OLLAMA_LOAD_TIMEOUT",))
    deterministic: bool = setting(
        False,
        "engine: the same request gives the same bytes, alone or beside others",
        env=("OSYNC_DETERMINISTIC",),
    )
    distributed: bool = setting(True, "proxy: may split models over shards", env=("OSYNC_DISTRIBUTED",))
    distributed_threshold: str = setting(
        "13B",
        "proxy: parameters from which a model is split where that is faster",
        env=("OSYNC_DISTRIBUTED_THRESHOLD",),
    )
    activation_dtype: str = setting(
        "f32",
        "proxy: what stages send each other: f32, or f16 and q8 for slow links",
        env=("OSYNC_ACTIVATION_DTYPE",),
        choices=("f32", "f16", "q8"),
    )
    stage_timeout: str = setting(
        "5s", "proxy: how long a pipeline may be without progress before it is made anew", env=("OSYNC_STAGE_TIMEOUT",)
    )
    drafts: bool = setting(
        True, "proxy: pipelines look tokens up in the text before and verify several in a trip", env=("OSYNC_DRAFTS",)
    )
    slice_cache: str = setting(
        "20GiB", "shard: disk for slices of models: 20GiB, bytes, 50% of the disk", env=("OSYNC_SLICE_CACHE",)
    )
    origins: tuple[str, ...] = setting(
        (),
        "origins that browsers may call from, beside Ollama's own list",
        env=("OLLAMA_ORIGINS",),
        split=True,
    )
    max_body: int = setting(64 << 20, "largest JSON body that the proxy takes, in bytes", env=("OSYNC_MAX_BODY",))
    insecure: bool = setting(
        False, "plaintext gRPC and open HTTP beyond loopback, said loudly at start", env=("OSYNC_INSECURE",)
    )
    drain_timeout: float = setting(30.0, "seconds that running streams get after SIGTERM", env=("OSYNC_DRAIN_TIMEOUT",))
    log_level: str = setting(
        "INFO",
        "DEBUG, INFO, WARNING, ERROR",
        env=("OLOL_LOG_LEVEL", "OSYNC_LOG_LEVEL", "OLLAMA_LOG_LEVEL", "OLLAMA_DEBUG"),
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
    )
    log_format: str = setting(
        "auto",
        "console, json, or auto: console on a terminal",
        env=("OSYNC_LOG_FORMAT",),
        choices=("auto", "console", "json"),
    )

    @property
    def is_loopback(self) -> bool:
        """True if the listeners can only be reached from this host."""
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")

    @property
    def peers(self) -> tuple[str, ...]:
        """Static peers of either list, each once, in order."""
        return tuple(dict.fromkeys(self.servers + self.rpc_servers))

    @property
    def model_dirs(self) -> tuple[Path, ...]:
        """Directories to look for models in: those given, else Ollama's own store."""
        return self.models_dir or (Path.home() / ".ollama" / "models",)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings with the origin of each: flag, variable, file or default."""

    settings: Settings
    origin: dict[str, str]


def fields() -> tuple[dataclasses.Field[Any], ...]:
    """Return the table of settings."""
    return dataclasses.fields(Settings)


def load(
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Loaded:
    """Merge flags (by field name, None: not given), environment and file. Raises ConfigError."""
    env = os.environ if env is None else env
    flags = flags or {}
    from_file = _read(file) if file else {}
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    known = {f.name: f for f in fields()}
    for key in (*flags, *from_file):
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}; see osyncd --print-config for those that exist")
    for name, f in known.items():
        variable = next((v for v in f.metadata["env"] if env.get(v, "").strip(" \"'")), None)
        if flags.get(name) is not None:
            raw, where = flags[name], "flag --" + name.replace("_", "-")
        elif variable:
            raw, where = env[variable].strip(" \"'"), f"environment {variable}"
        elif name in from_file:
            raw, where = from_file[name], f"file {file}"
        else:
            origin[name] = "default"
            continue
        values[name], origin[name] = _convert(f, raw, where), where
    settings = Settings(**values)
    _check(settings)
    return Loaded(settings, origin)


def _read(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} is not TOML: {error}") from error
    return {key.replace("-", "_"): value for key, value in table.items()}


_TRUE = {"1", "true", "yes", "on", "t", "y"}
_FALSE = {"0", "false", "no", "off", "f", "n"}


def _convert(f: dataclasses.Field[Any], raw: Any, where: str) -> Any:
    kind = str(f.type)
    try:
        if kind.startswith("tuple"):
            items = raw if isinstance(raw, (list, tuple)) else [raw]
            if f.metadata["split"]:
                items = [part.strip() for item in items for part in str(item).split(",") if part.strip()]
            value: Any = tuple(Path(i).expanduser() if "Path" in kind else str(i) for i in items)
        elif kind == "bool":
            word = str(raw).lower()
            if word not in _TRUE | _FALSE:
                raise ValueError("want true or false")
            value = word in _TRUE
        elif kind == "int":
            value = int(raw)
        elif kind == "float":
            value = float(raw)
        elif "Path" in kind:
            value = Path(str(raw)).expanduser()
        else:
            value = _word(f, str(raw), where)
    except ValueError as error:
        raise ConfigError(f"{f.name} from {where}: {raw!r} does not fit ({error})") from error
    choices = f.metadata["choices"]
    if choices:
        for item in value if isinstance(value, tuple) else (value,):
            if item not in choices:
                raise ConfigError(f"{f.name} from {where}: {item!r} is not one of {', '.join(choices)}")
    return value


_NUMBER_OR_WORD = {
    "flash_attention": ("on", "off"),
    "igpu": ("on", "off"),
    "numa": ("distribute", "off"),  # llama.cpp's own meaning of a bare --numa
}
"""Settings whose variable Ollama knows as true or false: what either means."""


def _word(f: dataclasses.Field[Any], raw: str, where: str) -> str:
    low = raw.lower()
    if f.name in _NUMBER_OR_WORD and low in _TRUE | _FALSE:
        return _NUMBER_OR_WORD[f.name][low in _FALSE]
    if f.name == "log_level":
        if where.endswith("OLLAMA_DEBUG"):  # true, or a depth: 1 debug, 2 trace
            return "INFO" if low in _FALSE else "DEBUG"
        return {"WARN": "WARNING", "TRACE": "DEBUG"}.get(raw.upper(), raw.upper())
    if f.name == "device" and where.endswith("OLLAMA_LLM_LIBRARY"):  # such as cuda_v13 or cpu_avx2
        return next((kind for kind in ("cpu", "cuda", "metal", "vulkan") if low.startswith(kind)), "auto")
    if f.name in {"kv_cache_type", "quantize", "numa"}:
        return low
    if f.name == "ollama_host" and "://" not in raw:
        return _ollama_url(raw)
    return raw


_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(%|(?:[kmgt]i?)?b?)", re.IGNORECASE)


def parse_memory(text: str) -> tuple[int, float]:
    """Read an amount of memory as (bytes, share of what is free); one of them is 0, or both. Units are
    powers of 1024. Raises ConfigError."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no amount of memory; say bytes, such as 12GiB, or a share, such as 80%")
    number, unit = float(match.group(1)), match.group(2).lower()
    if unit == "%":
        if number > 100:
            raise ConfigError(f"{text!r} of the memory is more than there is")
        return 0, number / 100
    amount = int(number * 1024.0 ** "bkmgt".index((unit or "b")[0]))
    if amount >= 1 << 63:
        raise ConfigError(f"{text!r} is more memory than any computer has")
    return amount, 0.0


_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", re.IGNORECASE)
_SPAN = re.compile(r"\d+|(?:\d+(?:\.\d+)?(?:ms|s|m|h))+")


def parse_count(text: str) -> int:
    """Read a number of parameters: 13B, 700M, 134.52M, 1000. Raises ConfigError."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no number of parameters; say 13B, 700M, or a plain number")
    return int(float(match.group(1)) * 1000.0 ** " kmbt".index(match.group(2).lower() or " "))


def _ollama_url(raw: str) -> str:
    """Complete a host as Ollama's own OLLAMA_HOST allows it; 0.0.0.0 is reached on loopback."""
    host, _, port = raw.rpartition(":") if ":" in raw else (raw, "", "")
    host = host or "127.0.0.1"
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port or 11434}"  # noqa: S104


def _check(settings: Settings) -> None:
    for name in ("port", "grpc_port"):
        if not 0 <= getattr(settings, name) <= 65535:
            raise ConfigError(f"{name} must be between 0 and 65535, not {getattr(settings, name)}")
    for name in ("parallel", "max_queue", "max_body"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(settings, name)}")
    for name in ("context_window", "threads", "max_loaded_models", "drain_timeout"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"{name} must not be negative")
    _check_engine(settings)
    if not settings.role:
        raise ConfigError("no role given; say --role proxy, --role node, or both")
    for peer in settings.peers:
        host, colon, port = peer.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) <= 65535):
            raise ConfigError(f"server {peer!r} is not host:port")
    if not settings.is_loopback and not settings.insecure:
        raise ConfigError(
            f"listening on {settings.host} would open this daemon to the network without any authentication; "
            "add --insecure if that is meant, or listen on 127.0.0.1"
        )


def _check_engine(settings: Settings) -> None:
    for name in ("main_gpu", "num_gpu"):
        if getattr(settings, name) < -1:
            raise ConfigError(f"{name} must be -1 or more, not {getattr(settings, name)}")
    for name in ("memory", "gpu_overhead", "slice_cache"):
        try:
            amount, share = parse_memory(getattr(settings, name))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        if name == "memory" and not amount and not share:
            raise ConfigError("memory must be more than nothing")
    try:
        parse_count(settings.distributed_threshold)
    except ConfigError as error:
        raise ConfigError(f"distributed_threshold: {error}") from None
    if not _SPAN.fullmatch(settings.stage_timeout) or not re.search("[1-9]", settings.stage_timeout):
        raise ConfigError(f"stage_timeout: {settings.stage_timeout!r} is no duration; say 5s, 800ms, or 2m")
    if settings.quantize and settings.quantize not in QUANTIZATIONS:
        raise ConfigError(f"quantize: {settings.quantize!r} is not one of {', '.join(QUANTIZATIONS)}")


def default_state_dir(env: Mapping[str, str] | None = None) -> Path:
    """Return the platform's directory for state: systemd's, XDG's, or the user library's."""
    env = os.environ if env is None else env
    if env.get("STATE_DIRECTORY"):
        return Path(env["STATE_DIRECTORY"].split(":")[0])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "osync"
    return Path(env.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "osync"
