"""The window follows its layer, whatever moves that: to another device, through casts, out of meta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def follow(window: Tensor, fn: Any) -> Tensor:
    """The window on the device that ``fn`` moves tensors to, every bit as it was; empty where the sums are lost."""
    # As integers, which .half() and .to(dtype) leave alone.
    bits = window.view(torch.int64)
    moved = fn(bits)
    # to_empty() gives memory with anything in it.
    emptied = moved.dtype == torch.int64 and not moved.is_meta and not bits.is_meta and not _equal(moved, bits)
    if moved.is_meta or bits.is_meta or emptied:
        # A meta tensor has no values to move, either.
        return torch.zeros_like(window, device=moved.device)
    # Of the answer only the device is taken.
    return window.to(moved.device)


def _equal(first: Tensor, second: Tensor) -> bool:
    # Most often nothing moved: no copy from a GPU then.
    return first is second or torch.equal(first.cpu(), second.cpu())


def bring_home(window: Tensor, device: torch.device) -> Tensor:
    """The window on the device of the data, as an ordinary tensor."""
    if window.is_meta:  # which never held a sum
        return torch.zeros_like(window, device=device)
    return window.detach().clone().to(device)
