"""Generate osync/pb from proto/osync/v1/*.proto. Run again, it leaves no difference.

The generated modules are flat (`from osync.pb import node_pb2`), while the files keep their canonical
names (`osync/v1/node.proto`) for reflection and for other languages. So the only rewriting is the name of
the Python package.
"""

from __future__ import annotations

import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
TARGET = PROTO.parent / "osync" / "pb"
PACKAGE = re.compile(r"\bosync\.v1(?=\.\w+_pb2| import \w+_pb2)")
MARK = '"""Generated from proto/ by make proto. Do not edit."""\n'


def generate(target: Path = TARGET) -> list[Path]:
    """Write the modules of all .proto files to `target` and return them; raises SystemExit if one is wrong."""
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("osync/v1/*.proto"))
    # The plug-ins of mypy-protobuf stand beside the interpreter, which need not be on PATH.
    plugins = [
        f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}"
        for name in ("mypy", "mypy_grpc")
    ]
    with tempfile.TemporaryDirectory() as directory:
        outputs = [f"--{kind}_out={directory}" for kind in ("python", "grpc_python")]
        outputs += [f"--{kind}_out=quiet:{directory}" for kind in ("mypy", "mypy_grpc")]
        well_known = str(files("grpc_tools") / "_proto")
        if protoc.main(["protoc", f"-I{PROTO}", f"-I{well_known}", *plugins, *outputs, *sources]):
            raise SystemExit("protoc refused a .proto file; see above")
        written = [_write(path, target) for path in sorted(Path(directory).glob("osync/v1/*_pb2*.py*"))]
    (target / "__init__.py").write_text(MARK)
    for stale in set(target.glob("*_pb2*.py*")) - set(written):
        stale.unlink()
    return written


def _write(path: Path, target: Path) -> Path:
    copy = target / path.name
    text = PACKAGE.sub("osync.pb", path.read_text())
    if not copy.exists() or copy.read_text() != text:
        copy.write_text(text)
    return copy


if __name__ == "__main__":
    generate()
