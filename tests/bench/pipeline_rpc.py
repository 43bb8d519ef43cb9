"""llama.cpp's own RPC backend, the baseline of the pipeline's benchmark, and the same loop on one host.

    python -m tests.bench.pipeline_rpc serve HOST:PORT THREADS
    python -m tests.bench.pipeline_rpc client MODEL HOST:PORT,… SPLIT,…      (no workers: all layers here)

The client takes one JSON command a line, and answers with one line. llama-cpp-python's wheel has no RPC backend as
it is built here; `build` compiles that one library from the sources of the very same version, against the wheel's own
ggml, once, into the user's cache: some seconds, after some 77 MB from the package index.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

PACKAGE = "llama-cpp-python"
SOURCES = ("ggml-rpc/ggml-rpc.cpp", "ggml-rpc/transport.cpp")
CONTEXT = 2048
SEQUENCES = 8


def libraries() -> Path:
    """Return where the installed llama.cpp has its libraries."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec and spec.submodule_search_locations, "pip install 'osync[engine]'"
    return Path(spec.submodule_search_locations[0]) / "lib"


def library() -> Path:
    """Return where the RPC backend is, or is to be."""
    bundled = libraries() / "libggml-rpc.so.0"
    if bundled.exists():
        return bundled
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "osync-bench" / f"libggml-rpc-{importlib.metadata.version(PACKAGE)}.so"


def build() -> Path:
    """Compile the RPC backend unless it is there. Raises CalledProcessError."""
    target = library()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    version = importlib.metadata.version(PACKAGE)
    with tempfile.TemporaryDirectory() as folder:
        wanted = ["--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={version}", "-d", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *wanted], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            marks = ("/ggml/include/", "/ggml/src/")
            members = [m for m in packed.getmembers() if m.isfile() and any(mark in m.name for mark in marks)]
            packed.extractall(folder, [m for m in members if m.name.endswith((".h", ".cpp"))], filter="data")
        (rpc,) = Path(folder).glob(f"**/{SOURCES[0]}")
        ggml = rpc.parents[2]
        command = [
            *("c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-DGGML_BACKEND_SHARED", "-DGGML_SHARED"),
            *(f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", *(str(ggml / "src" / source) for source in SOURCES)),
            *("-o", f"{target}.new", f"-L{libraries()}", "-l:libggml-base.so.0", "-lpthread"),
        ]
        subprocess.run(command, check=True)
    Path(f"{target}.new").replace(target)
    return target


def _ggml() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    import llama_cpp  # noqa: F401 (loads the libraries that the next one needs)

    # The .so.0 names: the plain ones may be copies, and loading one makes a second, empty device registry.
    ggml = ctypes.CDLL(str(libraries() / "libggml.so.0"), ctypes.RTLD_GLOBAL)
    rpc = ctypes.CDLL(str(library()))
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    rpc.ggml_backend_rpc_start_server.argtypes = [
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
    ]
    return ggml, rpc


def serve(endpoint: str, threads: int) -> None:
    """Be a worker: one client at a time, for ever."""
    ggml, rpc = _ggml()
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(0))
    rpc.ggml_backend_rpc_start_server(endpoint.encode(), None, threads, 1, ctypes.addressof(devices))


class Client:
    """A model over RPC workers, or here, with a loop over llama_decode and greedy sampling and nothing else."""

    def __init__(self, model: str, endpoints: list[str], split: list[int], ubatch: int) -> None:
        import llama_cpp.llama_cpp as api

        self.api = api
        self._log = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._log, None)
        if endpoints:
            ggml, rpc = _ggml()
        api.llama_backend_init()
        for endpoint in endpoints:
            ggml.ggml_backend_register(rpc.ggml_backend_rpc_add_server(endpoint.encode()))
        began = time.perf_counter()
        wanted = api.llama_model_default_params()
        wanted.n_gpu_layers = 99 if endpoints else 0
        self._split = (ctypes.c_float * 128)(*split)
        if endpoints:
            wanted.tensor_split = self._split
        self.model = api.llama_model_load_from_file(model.encode(), wanted)
        assert self.model, "the model did not load"
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CONTEXT * SEQUENCES, SEQUENCES
        params.n_batch, params.n_ubatch = 2048, ubatch
        params.n_threads = params.n_threads_batch = 1
        params.kv_unified = params.no_perf = True
        self.context = api.llama_init_from_model(self.model, params)
        self.batch = api.llama_batch_init(2048, 0, 1)
        self.sampler = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(self.sampler, api.llama_sampler_init_greedy())
        self.load_s = time.perf_counter() - began

    def _rows(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, samples) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, int(samples)
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode: {code}")

    def _sample(self, index: int) -> int:
        return int(self.api.llama_sampler_sample(self.sampler, self.context, index))

    def do_load(self) -> float:
        """Return the seconds that loading took."""
        return self.load_s

    def do_prompt(self, tokens: list[int]) -> float:
        """Return the seconds from a prompt to its first token."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        began = time.perf_counter()
        self._rows([(token, i, 0, i == len(tokens) - 1) for i, token in enumerate(tokens)])
        self._sample(-1)
        return time.perf_counter() - began

    def do_decode(self, prompts: list[list[int]], count: int) -> float:
        """Return tokens/s of all prompts' answers in one batch a step, which is what llama-server does."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        last = []
        for sequence, prompt in enumerate(prompts):
            self._rows([(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)])
            last.append(self._sample(-1))
        began = time.perf_counter()
        for step in range(count - 1):
            self._rows([(t, len(prompts[s]) + step, s, True) for s, t in enumerate(last)])
            last = [self._sample(s) for s in range(len(last))]
        return len(prompts) * (count - 1) / (time.perf_counter() - began)


def main() -> None:
    """Serve, or obey until stdin ends."""
    kind, *rest = sys.argv[1:]
    if kind == "serve":
        serve(rest[0], int(rest[1]))
        return
    model, endpoints, split, ubatch = rest
    client = Client(model, [e for e in endpoints.split(",") if e], [int(n) for n in split.split(",") if n], int(ubatch))
    print(json.dumps({"load_s": client.load_s}), flush=True)
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        print(json.dumps(getattr(client, "do_" + command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
