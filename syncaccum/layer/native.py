"""The compiled passes: which tensors they take, and their calls.

`kernels/passes.cpp` has them. Plain torch stands in where they are not (`measure`, `passes`), and is their oracle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from syncaccum.layer.library import load
from syncaccum.layer.memory_order import is_rows
from syncaccum.torch_private import is_watched

# As in passes.cpp, and so are the layouts of its two structs.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NONE, _GIVEN, RUNNING, BATCH, RENORM, WINDOW = range(6)
_FORWARD = Struct("@P4q 3P q4d Pq Pq 5P Pq Pq")
_BACKWARD = Struct("@P4q 3P Pq 4P Pq dPP Pq Pq")

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
    others: Tensor | None = None  # packed moments that the micro-batch is counted together with


_library, _which = load()


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
    feedback: float | None,
    owed: Tensor | None = None,  # comes to the sums, for the gradient of x
) -> tuple[list[Tensor | None], Tensor]:
    """Those of x, weight and bias that are needed, and the sums in one vector; ``found`` is from `normalize`."""
    return _gradients(dy, x, weight, bias, _places(found, recipe), feedback, needed, owed)


def _places(found: Tensor, recipe: Recipe) -> _Addresses:
    """Where center, scale, gain and offset are."""
    # 8 C numbers of 8 bytes, the first one aside.
    step = found.numel() - 1
    center = found.data_ptr() + 8 + 4 * step
    is_renorm = recipe.policy == RENORM
    return center, center + step, is_renorm and center + 2 * step, is_renorm and center + 3 * step


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
    others = _checked(recipe.others, 1 + 2 * channels)
    settings = (recipe.policy, recipe.eps, recipe.prior_count, recipe.r_max, recipe.d_max)
    data = (x.data_ptr(), _address(y), _address(moments))
    vectors = (*mean, *variance, _address(others), *norm, *weight_, *bias_)
    _library.forward(_FORWARD.pack(*geometry, *data, *settings, *vectors))


def gradient_sums(dy: Tensor, x: Tensor, norm: Vectors) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy x_hat, float64."""
    vectors = _wide(norm, x.shape[1])
    _, sums = _gradients(dy, x, None, None, _addresses(vectors), None, (False, False, False))
    first, second = sums.chunk(2)
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
    return _gradients(dy, x, weight, bias, _addresses(vectors), norm[4], needed)[0]


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: _Addresses,
    feedback: Tensor | float | None,
    needed: Sequence[bool],
    owed: Tensor | None = None,
) -> tuple[list[Tensor | None], Tensor]:
    sums = torch.empty(2 * x.shape[1], dtype=torch.float64, device="cpu")
    made = [
        torch.empty_like(v, requires_grad=False) if wanted and v is not None else None
        for v, wanted in zip((x, weight, bias), needed, strict=True)
    ]
    dx, dweight, dbias = made
    _backward(dy, x, weight, norm, feedback, sums, is_known=False, owed=owed, dx=dx, dweight=dweight, dbias=dbias)
    return made, sums


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norm: _Addresses,
    feedback: Tensor | float | None,
    sums: Tensor,
    *,
    is_known: bool,
    owed: Tensor | None = None,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    """Fill the sums, unless they are known, and then each gradient that is given."""
    assert _library is not None
    geometry = _geometry(x)
    weight = _checked(weight, geometry[3])
    owed = _checked(owed, 2 * geometry[3])
    one, each = _feedback(feedback, geometry[3])
    data = (dy.data_ptr(), x.data_ptr(), _address(dx), sums.data_ptr(), is_known)
    results = (_address(owed), *_typed(dweight), *_typed(dbias))
    _library.backward(_BACKWARD.pack(*geometry, *data, *norm, *_typed(weight), one, _address(each), *results))


def fold(call: bytes) -> float:
    """The call of fold.cpp; `window/compiled_fold.py` packs it."""
    assert _library is not None
    return float(_library.fold(call))


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


def _checked(vector: Tensor | None, size: int) -> Tensor | None:
    """Nobody else checks: compiled code reads whatever lies in memory."""
    if vector is None:
        return None
    if not vector.is_cpu or vector.shape != (size,):
        raise RuntimeError(
            f"statistics and parameters must be of shape ({size},) and on the input's device: "
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
