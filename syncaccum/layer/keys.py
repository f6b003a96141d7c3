"""Finds objects by a number in a tensor: operators of compiled code take tensors alone."""

from __future__ import annotations

import secrets
import weakref
from typing import Any

import torch
from torch import Tensor

_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def make_key(found: object) -> Tensor:
    """The key that finds this object, for as long as it lives."""
    # At random: a graph from a file has a key of another process.
    number = secrets.randbits(62)
    _objects[number] = found
    # A default device may be another one.
    return torch.tensor(number, device="cpu")


def find(key: Tensor) -> Any:
    """The object with this key.

    Raises:
        RuntimeError: this process has none.
    """
    found = _objects.get(int(key))
    if found is None:
        raise RuntimeError(
            "a graph of a training forward has lost the layer that it was made from: it was loaded from a file, or its "
            "model is gone. Train the model itself; to save a graph export it in eval mode"
        )
    return found
