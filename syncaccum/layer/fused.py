"""One micro-batch on a GPU under a policy that Triton kernels know: one launch between two walks over the data.

Triton comes with torch for CUDA. Where it is not, `passes` does the same in some thirty operations of torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from syncaccum.layer import gpu, native
from syncaccum.layer.compiled import find_recipe
from syncaccum.layer.measure import Measured
from syncaccum.layer.memory_order import as_passes, is_on_cuda
from syncaccum.layer.policies import Normalizer, Policy, Renorm, Running

# Channels of a program: few programs, and some for a GPU to share.
_BLOCK = 128

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


_is_broken = False
"""Whether a kernel could not be started: then torch does it, in this process."""


@functools.cache
def load_kernels() -> Any:
    """The module of the kernels; None where there is no Triton, or SYNCACCUM_TRITON=0 switched it off."""
    if os.environ.get("SYNCACCUM_TRITON", "1") == "0":
        return None
    try:
        return importlib.import_module("syncaccum.layer.kernels.vectors")
    except ImportError:
        return None


def are_in_use() -> bool:
    """Whether there are kernels, and all could be started so far."""
    return not _is_broken and load_kernels() is not None


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take a dense tensor, and what comes with it."""
    if not is_on_cuda(x) or x.numel() == 0 or not are_in_use():
        return False
    return all(t is None or (t.dtype in _DTYPES and t.device == x.device and t.is_contiguous()) for t in others)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, policy: Policy) -> tuple[Tensor, Tensor] | None:
    """What `passes.normalize` returns for a dense tensor; None where the kernels do not take it."""
    if not takes(x, weight, bias) or (recipe := find_recipe(policy, x, None)) is None:
        return None
    if not takes(x, recipe.mean, recipe.variance):
        return None
    channels = x.shape[1]
    n = x.numel() // channels
    with torch.no_grad():
        mean, variance = torch.batch_norm_update_stats(as_passes(x), None, None, 0.0)
        divisor, _ = gpu.split_feedback(recipe.feedback or 1.0)
        settings = recipe.policy, recipe.eps, recipe.prior_count, recipe.r_max, recipe.d_max
        given = mean, variance, recipe.mean, recipe.variance, weight, bias, n, divisor, *settings
        if (found := run(torch.ops.syncaccum.find_vectors.default, *given)) is None:
            return None
        wide, narrow, count = found
        packed, committed_mean, committed_variance = wide.split_with_sizes([1 + 2 * channels, channels, channels])
    if isinstance(policy, Running | Renorm):
        # As they were now: a commit may come before the backward.
        policy = policy._replace(committed_mean=committed_mean, committed_variance=committed_variance)
    vectors = unpack(narrow, recipe.feedback, weight, bias, has_gain=recipe.policy == native.RENORM)
    (y,) = gpu.normalize([x], vectors._replace(divisor=count), weight, bias, None, policy)
    return y, packed


def merge(
    parts: Sequence[Measured], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, gpu.Vectors] | None:
    """Packed moments of several micro-batches together, and what normalises all; None where no kernel does it."""
    parts = [part for part in parts if part.n > 0]
    counts = [part.n for part in parts]
    # The kernel is told two sizes: the last is often smaller.
    if not parts or len(set(counts[:-1])) > 1 or not all(takes(part.values, weight, bias) for part in parts):
        return None
    statistics = torch.stack([vector for part in parts for vector in (part.mean, part.variance)])
    given = statistics, weight, bias, counts[0], counts[-1], eps
    if (found := run(torch.ops.syncaccum.merge_vectors.default, *given)) is None:
        return None
    packed, narrow, count = found
    return packed, unpack(narrow, 1 / sum(counts), weight, bias)._replace(divisor=count)


def run(operator: Any, *given: Any) -> Any:
    """What an operator returns; None where Triton cannot start its kernel, once and for all."""
    global _is_broken
    try:
        return operator(*given)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Of many kinds: no compiler for its launcher, no driver, a GPU that it does not know.
        _is_broken = True
        warnings.warn(f"Triton kernels are switched off, and torch stands in: {error!r}", RuntimeWarning, stacklevel=2)
        return None


def unpack(
    narrow: Tensor, feedback: float | None, weight: Tensor | None, bias: Tensor | None, *, has_gain: bool = False
) -> gpu.Vectors:
    """A kernel's vectors, by their names."""
    center, scale, slope, shift, gamma, gain, offset = narrow.unbind()
    norm = Normalizer(center, scale, gain if has_gain else None, offset if has_gain else None, feedback)
    has_gamma, has_shift = has_gain or weight is not None, has_gain or bias is not None
    return gpu.Vectors(norm, slope, shift if has_shift else None, gamma if has_gamma else None)


def make_room(mean: Tensor, wide: int) -> tuple[Tensor, Tensor, Tensor]:
    """So many float64 numbers, seven vectors of the passes' dtype, and a count."""
    room = mean.new_empty(wide, dtype=torch.float64)
    return room, mean.new_empty(7, mean.shape[-1]), mean.new_empty(1, dtype=torch.int32)


def launch(name: str, channels: int, device_of: Tensor, *given: Any, **settings: Any) -> None:
    """Start a kernel on the device of a tensor."""
    # Triton starts it on the current device.
    with torch.cuda.device_of(device_of):  # type: ignore[no-untyped-call]
        getattr(load_kernels(), name)[(-(-channels // _BLOCK),)](*given, channels, **settings, BLOCK=_BLOCK)


def _find_vectors(mean: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *vectors, n, divisor, policy, eps, prior_count, r_max, d_max = given
    channels = mean.numel()
    room = make_room(mean, 1 + 4 * channels)
    settings = {"POLICY": policy, "EPS": eps, "PRIOR_COUNT": prior_count, "R_MAX": r_max, "D_MAX": d_max}
    launch("find_vectors", channels, mean, mean, *vectors, *room, n, divisor, **settings)
    return room


def _merge_vectors(
    statistics: Tensor, weight: Tensor | None, bias: Tensor | None, values: int, last: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    vectors, channels = statistics.shape
    room = make_room(statistics, 1 + 2 * channels)
    given = statistics, weight, bias, *room, values, last
    launch("merge_vectors", channels, statistics, *given, PARTS=vectors // 2, EPS=eps)
    return room


# With less to do for each call than torch.library.custom_op: 2 us and not 10.
_library = torch.library.Library("syncaccum", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make a kernel an operator, which modes and compilers see as one."""
    _library.define(name + schema)  # type: ignore[no-untyped-call]
    _library.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"syncaccum::{name}", fake)


define(
    "find_vectors",
    "(Tensor mean, Tensor variance, Tensor? committed_mean, Tensor? committed_variance, Tensor? weight, Tensor? bias, "
    "int n, int divisor, int policy, float eps, float prior_count, float r_max, float d_max) "
    "-> (Tensor, Tensor, Tensor)",
    _find_vectors,
    lambda mean, *_: make_room(mean, 1 + 4 * mean.numel()),
)
define(
    "merge_vectors",
    "(Tensor statistics, Tensor? weight, Tensor? bias, int values, int last, float eps) -> (Tensor, Tensor, Tensor)",
    _merge_vectors,
    lambda statistics, *_: make_room(statistics, 1 + 2 * statistics.shape[1]),
)
