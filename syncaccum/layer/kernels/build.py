"""Compile the passes into this folder: ``python syncaccum/layer/kernels/build.py``.

Needs a C++17 compiler (the variable CXX names it, else c++) and neither torch nor its headers: an install from source
runs this file, too, in an environment without torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Sums may be reordered where the source says so only.
# Floating-point exceptions and errno, which nobody reads, forbid vectors.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# With flags of its own each. A product and a sum fused into one operation
# would round otherwise than torch's two, and ranks need the same bits.
SOURCES: dict[str, list[str]] = {"passes.cpp": [], "fold.cpp": ["-ffp-contract=off"]}
# One library for each that torch.backends.cpu.get_cpu_capability() may answer:
# who builds need not be who runs.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
CAPABILITIES = {"DEFAULT": [], "AVX2": _AVX2, "AVX512": _AVX512}


def library_for(capability: str) -> Path:
    """Where the library is, or will be."""
    return HERE / f"passes.{capability}.so"


def is_current(capability: str) -> bool:
    """Whether the library was built from the source and the flags that are here now."""
    return _take_fingerprint(capability).encode() in library_for(capability).read_bytes()


def _take_fingerprint(capability: str) -> str:
    source = b"".join((HERE / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(source + repr((FLAGS, SOURCES, CAPABILITIES[capability])).encode()).hexdigest()


def build() -> list[Path]:
    """The libraries, compiled.

    Raises:
        OSError: there is no compiler.
        subprocess.CalledProcessError: it failed; ``stderr`` says why.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [_compile(name, flags) for name, flags in CAPABILITIES.items() if x86 or not flags]


def _compile(capability: str, flags: list[str]) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    path = library_for(capability)
    # Moved into place whole: another process may load it meanwhile.
    unfinished = path.with_suffix(f".{os.getpid()}")
    mark = f'-DSYNCACCUM_SOURCE="{_take_fingerprint(capability)}"'
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, source).with_suffix(".o")) for source in SOURCES]
        for (source, its_flags), compiled in zip(SOURCES.items(), objects, strict=True):
            _run([*compiler, *FLAGS, *flags, *its_flags, mark, "-c", str(HERE / source), "-o", compiled])
        _run([*compiler, "-shared", *objects, "-o", str(unfinished)])
    return unfinished.replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> None:
    try:
        for path in build():
            print(f"built {path.name}")
    except OSError as error:
        print(f"syncaccum runs without compiled passes: no C++ compiler ({error})", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"syncaccum runs without compiled passes: {error}\n{error.stderr}", file=sys.stderr)


if __name__ == "__main__":
    main()
