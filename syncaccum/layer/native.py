"""The compiled passes: whether they are here, which tensors they take, and their calls.

`kernels/passes.cpp` has them. Plain torch stands in where they are not (`measure`, `passes`), and is their oracle.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_void_p
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from syncaccum.layer.kernels.build import is_current, library_for
from syncaccum.layer.memory_order import is_rows
from syncaccum.torch_private import is_watched

# As in passes.cpp, and so are the layouts of its two structs.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NONE, _GIVEN, RUNNING, BATCH, RENORM = range(5)
_FORWARD = Struct("@P4q 3P q4d Pq Pq 4P Pq Pq")
_BACKWARD = Struct("@P4q 3P Pq 4P Pq dP Pq Pq")

_PLAIN = (Tensor, nn.Parameter)

Vectors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | float | None]
"""A `policies.Normalizer`: center, scale, gain, offset, feedback."""
_Addresses = tuple[int, int, int, int]
_NOWHERE: _Addresses = (0, 0, 0, 0)


class Recipe(NamedTuple):
    """A policy that is compiled, too."""

    policy: int
    feedback: float | None
    """Of `policies.Normalizer`."""
    eps: float
    mean: Tensor | None = None
    """The committed one, and so the variance."""
    variance: Tensor | None = None
    prior_count: float = 0.0
    r_max: float = 0.0
    d_max: float = 0.0


class _Library:
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


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The output, and 1 + 8 C numbers: packed moments; then mean, variance, and what `gradients_of` needs."""
    channels = x.shape[1]
    y = torch.empty_like(x)
    found = torch.empty(1 + 8 * channels, dtype=torch.float64, device="cpu")
    _forward(x, y, found, recipe, _places(found, recipe), weight, bias)
    return y, found


def gradients_of(
    found: Tensor,
    recipe: Recipe,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Those of x, weight and bias that are needed; ``found`` is from `normalize`."""
    return _gradients(dy, x, weight, bias, _places(found, recipe), recipe.feedback, needed)


def _places(found: Tensor, recipe: Recipe) -> _Addresses:
    """Where center, scale, gain and offset are."""
    size = found.numel() - 1
    center, scale, gain, offset = (found.data_ptr() + 8 + k * size for k in (4, 5, 6, 7))
    return (center, scale, gain, offset) if recipe.policy == RENORM else (center, scale, 0, 0)


def measure(x: Tensor) -> Tensor:
    """x's packed moments, then mean and population variance: 1 + 4 C numbers."""
    found = torch.empty(1 + 4 * x.shape[1], dtype=torch.float64, device="cpu")
    _forward(x, None, found, _JUST_MEASURE, _NOWHERE, None, None)
    return found


def apply(x: Tensor, norm: Vectors, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The output."""
    y = torch.empty_like(x)
    vectors = _wide(norm, x.shape[1])
    _forward(x, y, None, _AS_GIVEN, _addresses(vectors), weight, bias)
    return y


_JUST_MEASURE, _AS_GIVEN = Recipe(_NONE, None, 0.0), Recipe(_GIVEN, None, 0.0)


def _forward(
    x: Tensor,
    y: Tensor | None,
    moments: Tensor | None,
    recipe: Recipe,
    norm: _Addresses,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Fill output and moments, whichever are given, and the vectors of a normalizer that the recipe makes."""
    assert _library is not None
    geometry = _geometry(x)
    channels = geometry[3]
    # In a list: they must live until the call is over.
    typed = [_checked(v, channels) for v in (recipe.mean, recipe.variance, weight, bias)]
    (mean, variance, weight_, bias_) = map(_typed, typed)
    settings = (recipe.policy, recipe.eps, recipe.prior_count, recipe.r_max, recipe.d_max)
    data = (x.data_ptr(), _address(y), _address(moments))
    _library.forward(_FORWARD.pack(*geometry, *data, *settings, *mean, *variance, *norm, *weight_, *bias_))


def gradient_sums(dy: Tensor, x: Tensor, norm: Vectors) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy x_hat, float64."""
    sums = torch.empty(2, x.shape[1], dtype=torch.float64, device="cpu")
    vectors = _wide(norm, x.shape[1])
    _backward(dy, x, None, _addresses(vectors), None, sums, is_known=False)
    first, second = sums.unbind()
    return first, second


def apply_gradient(dy: Tensor, x: Tensor, weight: Tensor | None, norm: Vectors, sums: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of x, from the two sums."""
    dx = torch.empty_like(x)
    vectors = _wide(norm, x.shape[1])
    both = torch.stack(sums).to(torch.float64)
    _backward(dy, x, weight, _addresses(vectors), norm[4], both, is_known=True, dx=dx)
    return dx


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Vectors, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Those of x, weight and bias that are needed, where nobody else has a part in the sums."""
    vectors = _wide(norm, x.shape[1])
    return _gradients(dy, x, weight, bias, _addresses(vectors), norm[4], needed)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: _Addresses,
    feedback: Tensor | float | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    sums = torch.empty(2, x.shape[1], dtype=torch.float64, device="cpu")
    made = [
        torch.empty_like(v, requires_grad=False) if wanted and v is not None else None
        for v, wanted in zip((x, weight, bias), needed, strict=True)
    ]
    dx, dweight, dbias = made
    _backward(dy, x, weight, norm, feedback, sums, is_known=False, dx=dx, dweight=dweight, dbias=dbias)
    return made


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norm: _Addresses,
    feedback: Tensor | float | None,
    sums: Tensor,
    *,
    is_known: bool,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """Fill the sums, unless they are known, and then each gradient that is given."""
    assert _library is not None
    geometry = _geometry(x)
    weight = _checked(weight, geometry[3])
    one, each = _feedback(feedback, geometry[3])
    data = (dy.data_ptr(), x.data_ptr(), _address(dx), sums.data_ptr(), is_known)
    results = (*_typed(dweight), *_typed(dbias))
    _library.backward(_BACKWARD.pack(*geometry, *data, *norm, *_typed(weight), one, _address(each), *results))


def fold(call: bytes) -> float:
    """The call of fold.cpp; `window/compiled_fold.py` packs it."""
    assert _library is not None
    checksum: float = _library.fold(call)
    return checksum


def _feedback(feedback: Tensor | float | None, channels: int) -> tuple[float, Tensor | None]:
    """As one number, or as one for each channel; NaN for none."""
    if feedback is None:
        return math.nan, None
    if isinstance(feedback, Tensor):
        return (math.nan, _wide([feedback], channels)[0]) if feedback.dim() > 0 else (feedback.item(), None)
    return feedback, None


def _geometry(x: Tensor) -> tuple[int, int, int, int, int]:
    """The loop over threads, the dtype, and the shape: (N, C, L) rows or (values, C, 1) columns."""
    assert _library is not None
    samples, channels = x.shape[:2]
    values = x.numel() // channels
    rows = samples if is_rows(x) else values
    return _library.parallel_for, _DTYPES[x.dtype], rows, channels, values // rows


def _wide(vectors: Sequence[Any], channels: int) -> list[Tensor | None]:
    """Those of a normalizer in float64; who calls keeps them until passes.cpp has read them."""
    return [v if v is None else _checked(v.to(torch.float64), channels) for v in vectors[:4]]


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


def _addresses(vectors: list[Tensor | None]) -> _Addresses:
    center, scale, gain, offset = map(_address, vectors)
    return center, scale, gain, offset


def _typed(vector: Tensor | None) -> tuple[int, int]:
    """Address and dtype."""
    return (0, 0) if vector is None else (vector.data_ptr(), _DTYPES[vector.dtype])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
