"""Every private name of torch that this package needs: one name each, and a test that guards its meaning.

torch may change these without a word. Then one test of ``tests/unit/test_torch_private.py`` fails and names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.overrides
from torch import Tensor, nn
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _python_dispatch as dispatch

__all__ = ["BatchNormBase"]


def runs_in_backward() -> bool:
    """Whether autograd runs this forward again, as torch.utils.checkpoint makes it do, reentrant or not."""
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode AD, differentiates what runs now."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def take_out_of_transforms(tensor: Tensor) -> Tensor:
    """The plain tensor inside those that torch.func's transforms wrap; of a batch of vmap, all of it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.detach()


def is_in_vmap(tensor: Tensor) -> bool:
    """Whether vmap has one of this tensor for each of many examples."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def outside_transforms() -> AbstractContextManager[Any]:
    """No transform of torch.func is in force: it would refuse to change a tensor that it does not know."""
    return pyfunctorch.temporarily_clear_interpreter_stack()


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers. Its attributes are looked up in four places, which adds up over some hundred layers."""
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters."""
    return module._parameters


def submodules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own children."""
    return module._modules


# torch's own functions, not ours around them: no signal handler may run between their calls (window/uninterrupted).
copy_all = torch._foreach_copy_
"""Copy each value into its tensor, all in one call."""

add_to_all = torch._foreach_add_
"""Add a number to each tensor in place, all in one call."""

zero_all = torch._foreach_zero_
"""Fill each tensor with zeros, all in one call."""


def without_torch_function() -> AbstractContextManager[None]:
    """Call torch's functions as they are, whatever mode is in force; ``torch.device`` as a context is one."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def ddp_in_forward() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward this process is in; None outside."""
    return DistributedDataParallel._active_ddp_module


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
