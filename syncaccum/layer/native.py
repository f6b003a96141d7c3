"""The compiled passes: whether they are here, which tensors they take, and their calls.

`kernels/passes.cpp` has them. Plain torch stands in where they are not (`measure`, `passes`), and is their oracle.
A commit's arithmetic, of `kernels/fold.cpp`, is in the same library.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncaccum.layer.kernels.build import library_for
from syncaccum.layer.memory_order import is_rows
from syncaccum.torch_private import is_watched

# As in passes.cpp.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PLAIN = (Tensor, nn.Parameter)

Vectors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | float | None]
"""A `policies.Normalizer`: center, scale, gain, offset, feedback."""
_NO_VECTORS: tuple[None, ...] = (None,) * 4

_GEOMETRY: list[Any] = [c_void_p, c_int32, c_int64, c_int64, c_int64]
_NORMALIZER: list[Any] = [c_void_p] * 4
_TYPED: list[Any] = [c_void_p, c_int32]
_FORWARD = [*_GEOMETRY, *[c_void_p] * 3, *_NORMALIZER, *_TYPED * 2]
_FOLD = [c_int64, *[c_void_p] * 3, c_int32, c_void_p]
_BACKWARD = [*_GEOMETRY, *[c_void_p] * 4, c_int32, *_NORMALIZER, *_TYPED, c_void_p, c_int64, *_TYPED * 2]


class _Library:
    """The functions of kernels/, and torch's own loop over threads, which they run in."""

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
        self.parallel_for = ctypes.cast(loop, c_void_p)
        library = ctypes.CDLL(str(path))
        try:
            self.forward, self.backward = library.syncaccum_forward, library.syncaccum_backward
            self.fold = library.syncaccum_fold
        except AttributeError:
            raise OSError(f"{path.name} was built from other source: build it again") from None
        self.forward.argtypes, self.backward.argtypes, self.fold.argtypes = _FORWARD, _BACKWARD, _FOLD
        self.forward.restype = self.backward.restype = None
        self.fold.restype = c_double


def _load() -> tuple[_Library | None, str]:
    try:
        library = _Library()
    except OSError as error:
        return None, f"torch ({error})"
    return library, f"compiled, {library.capability}"


_library, _which = _load()


def which() -> str:
    """Which passes CPU tensors take: ``compiled`` and for what kind of processor, or ``torch`` and why."""
    return _which


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled passes take a dense tensor, and what comes with it: plain ones, in CPU memory."""
    if _library is None or is_watched():
        return False
    for tensor in (x, *others):
        # A negative view has the other sign in memory.
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.is_cpu and tensor.dtype in _DTYPES and not tensor.is_neg()
        ):
            return False
    # An empty one has no first value to measure from.
    return x.numel() > 0


def measure(
    x: Tensor, norm: Vectors | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x's packed moments, then mean and population variance: 1 + 4 C numbers. And the output, if ``norm`` is given."""
    found = torch.empty(1 + 4 * x.shape[1], dtype=torch.float64, device="cpu")
    output = None if norm is None else torch.empty_like(x)
    _forward(x, output, found, norm, weight, bias)
    return found, output


def apply(x: Tensor, norm: Vectors, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The output."""
    output = torch.empty_like(x)
    _forward(x, output, None, norm, weight, bias)
    return output


def _forward(
    x: Tensor,
    output: Tensor | None,
    moments: Tensor | None,
    norm: Vectors | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Fill the output and the moments, whichever are given, in one walk over x."""
    assert _library is not None
    channels = x.shape[1]
    # In lists: they must live until the call is over.
    vectors = [_wide(v, channels) for v in (norm[:4] if norm else _NO_VECTORS)]
    parameters = [_checked(v, channels) for v in (weight, bias)]
    data = (x.data_ptr(), _address(output), _address(moments))
    _library.forward(*_geometry(x), *data, *map(_address, vectors), *_typed(*parameters))


def gradient_sums(dy: Tensor, x: Tensor, norm: Vectors) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy x_hat, float64."""
    sums = torch.empty(2, x.shape[1], dtype=torch.float64, device="cpu")
    _backward(dy, x, None, norm, sums, is_known=False)
    first, second = sums.unbind()
    return first, second


def apply_gradient(dy: Tensor, x: Tensor, weight: Tensor | None, norm: Vectors, sums: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of x, from the two sums."""
    dx = torch.empty_like(x)
    _backward(dy, x, weight, norm, torch.stack(sums).to(torch.float64), is_known=True, dx=dx)
    return dx


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Vectors, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, weight and bias that are needed, where nobody else has a part in the sums."""
    sums = torch.empty(2, x.shape[1], dtype=torch.float64, device="cpu")
    dx, dweight, dbias = (
        torch.empty_like(v, requires_grad=False) if wanted and v is not None else None
        for v, wanted in zip((x, weight, bias), needed, strict=True)
    )
    _backward(dy, x, weight, norm, sums, is_known=False, dx=dx, dweight=dweight, dbias=dbias)
    return dx, dweight, dbias


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norm: Vectors,
    sums: Tensor,
    *,
    is_known: bool,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """Fill the sums, unless they are known, and then each gradient that is given."""
    assert _library is not None
    channels = x.shape[1]
    vectors = [_wide(v, channels) for v in norm[:4]]
    parameter = _checked(weight, channels)
    feedback = _feedback(norm[4], channels)
    stride = 0 if feedback is None or feedback.dim() == 0 else 1
    data = (dy.data_ptr(), x.data_ptr(), _address(dx), sums.data_ptr(), is_known)
    settings = (*map(_address, vectors), *_typed(parameter), _address(feedback), stride)
    _library.backward(*_geometry(x), *data, *settings, *_typed(dweight, dbias))


def fold(*arguments: Any) -> float:
    """The call of fold.cpp; `window/compiled_fold.py` says what with."""
    assert _library is not None
    checksum: float = _library.fold(*arguments)
    return checksum


def _feedback(feedback: Tensor | float | None, channels: int) -> Tensor | None:
    if feedback is None or (isinstance(feedback, Tensor) and feedback.dim() > 0):
        return _wide(feedback, channels)
    return torch.as_tensor(feedback, dtype=torch.float64, device="cpu")


def _geometry(x: Tensor) -> tuple[c_void_p, int, int, int, int]:
    """The loop over threads, the dtype, and the shape: (N, C, L) rows or (values, C, 1) columns."""
    assert _library is not None
    channels = x.shape[1]
    values = x.numel() // channels
    rows = x.shape[0] if is_rows(x) else values
    return _library.parallel_for, _DTYPES[x.dtype], rows, channels, values // rows


def _wide(vector: Tensor | None, channels: int) -> Tensor | None:
    if vector is not None and vector.dtype is not torch.float64:
        vector = vector.to(torch.float64)
    return _checked(vector, channels)


def _checked(vector: Tensor | None, channels: int) -> Tensor | None:
    """Nobody else checks: compiled code reads whatever lies in memory."""
    if vector is None:
        return None
    if not vector.is_cpu or vector.shape != (channels,):
        raise RuntimeError(
            f"statistics and parameters must be of shape ({channels},) and on the input's device: "
            f"got {tuple(vector.shape)} on {vector.device}"
        )
    return vector.contiguous()


def _typed(*vectors: Tensor | None) -> list[int | None]:
    """Address and dtype of each."""
    return [part for v in vectors for part in ((None, 0) if v is None else (v.data_ptr(), _DTYPES[v.dtype]))]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
