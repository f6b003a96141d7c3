"""Every private name of torch that this package needs: one function each, and a test that guards its meaning.

torch may change these without a word. Then one test of ``tests/unit/test_torch_private.py`` fails and names it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.overrides
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.parallel import DistributedDataParallel, distributed
from torch.utils import _python_dispatch as dispatch

__all__ = ["BatchNormBase"]


def runs_in_backward() -> bool:
    """Whether autograd runs this forward again, as torch.utils.checkpoint makes it do, reentrant or not."""
    return torch._C._current_graph_task_id() != -1


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers. Its attributes are looked up in four places, which adds up over some hundred layers."""
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters."""
    return module._parameters


def submodules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own children."""
    return module._modules


def copy_all(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its tensor, all in one call."""
    torch._foreach_copy_(list(into), list(values))


def add_to_all(tensors: Sequence[Tensor], number: int) -> None:
    """Add a number to each tensor in place, all in one call."""
    torch._foreach_add_(list(tensors), number)


def zero_all(tensors: Sequence[Tensor]) -> None:
    """Fill each tensor with zeros, all in one call."""
    torch._foreach_zero_(list(tensors))


def add_all(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Add each value to its tensor, all in one call: no signal comes between."""
    torch._foreach_add_(list(into), list(values))


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to. Inference tensors do not count: always 0."""
    return 0 if tensor.is_inference() else tensor._version


def ddp_in_forward() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward this process is in; None outside."""
    return DistributedDataParallel._active_ddp_module


def set_ddp_in_forward(ddp: DistributedDataParallel | None) -> None:
    """Note whose forward this process is in, as DDP does when it begins and ends one."""
    DistributedDataParallel._active_ddp_module = ddp


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors that DDP finds in what a forward returned."""
    return list(distributed._find_tensors(output))  # type: ignore[no-untyped-call]


def prepare_for_backward(ddp: DistributedDataParallel, outputs: Sequence[Tensor]) -> None:
    """Get DDP's reducer ready, as it does after a forward; parameters that no output depends on count as unused.

    Replaces what it made ready before.
    """
    ddp.reducer.prepare_for_backward(list(outputs))


def compile_stance() -> Any:
    """What compiled functions do when they are called, in the whole process. Imports the compiler."""
    return importlib.import_module("torch._dynamo.eval_frame")._stance


def restore_compile_stance(stance: Any) -> None:
    """Make compiled functions do what :func:`compile_stance` said."""
    importlib.import_module("torch._dynamo.eval_frame")._set_stance(stance)


def join_settings(ddp: DistributedDataParallel) -> Any:
    """DDP's settings of ``join``: enable, throw_on_early_termination and is_first_joinable, a named tuple."""
    return ddp._join_config


def set_join_settings(ddp: DistributedDataParallel, **settings: bool) -> None:
    """Change some of DDP's settings of ``join``."""
    ddp._join_config = ddp._join_config._replace(**settings)


def saved_tensor_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The pack and unpack hooks that are in force in this thread."""
    hooks: tuple[Callable[..., Any], Callable[..., Any]] | None = torch._C._autograd._top_saved_tensors_default_hooks(
        False
    )
    return hooks


def function_modes() -> list[Any]:
    """The torch-function modes of this thread, outermost first."""
    return list(torch.overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def dispatch_modes() -> list[Any]:
    """The torch-dispatch modes of this thread, outermost first."""
    return list(dispatch._get_current_dispatch_mode_stack())


@contextmanager
def in_function_mode(mode: Any) -> Iterator[None]:
    """A torch-function mode in force, without entering it: it was entered already, and some keep account."""
    torch.overrides._push_mode(mode)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.overrides._pop_mode()  # type: ignore[no-untyped-call]


@contextmanager
def in_dispatch_mode(mode: Any) -> Iterator[None]:
    """As :func:`in_function_mode`, for a torch-dispatch mode."""
    dispatch._push_mode(mode)
    try:
        yield
    finally:
        dispatch._pop_mode()
