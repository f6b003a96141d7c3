"""The compiled library: whether it is here and fits, and its functions. `native` and `compiled_fold` call them."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_double, c_void_p
from pathlib import Path

import torch

from syncaccum.layer.kernels.build import is_current, library_for


class Library:
    """The functions of passes.cpp and fold.cpp, and torch's own loop over threads, which they run in."""

    def __init__(self) -> None:
        if os.environ.get("SYNCACCUM_NATIVE", "1") == "0":
            raise OSError("SYNCACCUM_NATIVE=0 switched them off")
        self.capability = torch.backends.cpu.get_cpu_capability()
        path = library_for(self.capability)
        if not path.exists():
            raise OSError(f"{path.name} was not built: install from source where there is a C++ compiler")
        try:
            # Of torch's stable C interface, since 2.10.
            loop = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so")).torch_parallel_for
        except (OSError, AttributeError):
            raise OSError("torch has no torch_parallel_for: they need torch 2.10 or newer") from None
        self.parallel_for = ctypes.cast(loop, c_void_p).value or 0
        # Its structs may differ: wrong numbers, or a crash.
        if not is_current(self.capability):
            raise OSError(f"{path.name} was built from another version of its source: install anew")
        library = ctypes.CDLL(str(path))
        self.forward, self.backward = library.syncaccum_forward, library.syncaccum_backward
        self.fold = library.syncaccum_fold
        # A packed struct: one argument takes ctypes a tenth of the time.
        self.forward.argtypes = self.backward.argtypes = self.fold.argtypes = [c_char_p]
        self.forward.restype = self.backward.restype = None
        self.fold.restype = c_double


def load() -> tuple[Library | None, str]:
    """The library, and for what kind of processor it is; or None, and why."""
    try:
        library = Library()
    except OSError as error:
        return None, f"torch ({error})"
    return library, f"compiled, {library.capability}"
