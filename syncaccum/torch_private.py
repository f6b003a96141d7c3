"""Every private name of torch that this package calls: one function each, and a test that guards its meaning.

torch may change these without a word. Then one test of ``tests/unit/test_torch_private.py`` fails and names it.

Two kinds of underscore names are elsewhere, because they belong to modules and not to torch's inside: methods that
layers override (``_apply``, ``_load_from_state_dict``, ``_check_input_dim``), and what wrappers leave on modules
(``_is_replica``, ``_orig_mod`` and the like).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.overrides
from torch import Tensor, nn
from torch._functorch import pyfunctorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.parallel import DistributedDataParallel, distributed
from torch.nn.utils import stateless
from torch.utils import _python_dispatch as dispatch

# mypy lets others import an imported name only if listed.
__all__ = ["BatchNormBase"]


def runs_in_backward() -> bool:
    """Whether autograd runs this forward again, as torch.utils.checkpoint makes it do, reentrant or not."""
    return number_of_backward() != -1


def number_of_backward() -> int:
    """The number of the backward that runs here, another one for each; -1 outside."""
    return torch._C._current_graph_task_id()


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode AD, differentiates what runs now."""
    # torch.func keeps a stack of transforms; None if empty.
    # Forward-mode AD counts its levels from 0; -1 is none.
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor is only a shape: on the meta device, or a fake one of tools that estimate memory or cost."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def take_out_of_transforms(tensor: Tensor) -> Tensor:
    """The plain tensor inside the wrappers of torch.func's transforms. Under vmap it has all examples."""
    # Transforms nest, and each adds a wrapper.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.detach()


def is_in_vmap(tensor: Tensor) -> bool:
    """Whether vmap makes one tensor of many examples look like a single example here."""
    # vmap's wrapper may be under that of grad, or over it.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def given_to_functional_call() -> Iterator[Tensor]:
    """The parameters and buffers that the calls of ``torch.func.functional_call`` around this code were given."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is stateless._functional_call.__code__:
            yield from frame.f_locals["parameters_and_buffers"].values()


def outside_transforms() -> AbstractContextManager[Any]:
    """A context without torch.func's transforms. They refuse to change, in place, a tensor from outside of them."""
    return pyfunctorch.temporarily_clear_interpreter_stack()


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers.

    Faster than ``module.running_mean``: nn.Module looks an attribute up in four places. Some hundred layers feel that.
    """
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters."""
    return module._parameters


def submodules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own children."""
    return module._modules


# Names for torch's own functions, with none of ours around them:
# no signal handler may run between two of them (window/uninterrupted).
copy_all = torch._foreach_copy_
"""Copy each value into its tensor, all in one call."""

add_to_all = torch._foreach_add_
"""Add a number to each tensor in place, or a tensor of its own to each, all in one call."""

take_from_all = torch._foreach_sub_
"""Subtract a tensor of its own from each tensor in place, all in one call."""

scale_each = torch._foreach_mul
"""Each tensor times a number of its own, as new tensors, all in one call."""

zero_all = torch._foreach_zero_
"""Fill each tensor with zeros, all in one call."""


def without_torch_function() -> AbstractContextManager[None]:
    """A context in which torch's functions run as they are, whatever mode is in force outside.

    A mode is Python code that sees each call. ``with torch.device(...)`` is one.
    """
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to. Inference tensors do not count: always 0."""
    return 0 if tensor.is_inference() else tensor._version


def count_node() -> int:
    """Make an autograd node, and say how many this thread has made before. Of two, a backward walks the later first."""
    # Of all nodes the one that needs nothing.
    node: Any = torch._C._functions.DelayedError("", 1)
    number: int = node._sequence_nr()
    return number


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


def rebuild_buckets(ddp: DistributedDataParallel) -> None:
    """Let DDP sort its buckets anew now, if it has a mind to: else it does in its next forward. Collective then."""
    ddp.reducer._rebuild_buckets()


def forward_hooks_of(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]:
    """What a module calls before its forward, and behind it, by the ids of their handles."""
    return module._forward_pre_hooks, module._forward_hooks


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was called with this module."""
    # A public name; where nobody imported it, nothing is sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def method_of_fully_shard(hook: Callable[..., Any]) -> Any:
    """The method of FSDP's state that a hook of a module's forward is, or calls; None where it is no hook of FSDP's."""
    states = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    # Hooks of a group of modules are functions around the method.
    while not hasattr(hook, "__self__") and hasattr(hook, "__wrapped__"):
        hook = hook.__wrapped__
    is_theirs = states is not None and isinstance(getattr(hook, "__self__", None), states.FSDPState)
    return hook if is_theirs else None


def sharded_forwards() -> list[nn.Module]:
    """The modules under fully_shard whose forward this code runs in, innermost first."""
    found = []
    frame = sys._getframe() if "torch.distributed.fsdp" in sys.modules else None
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and is_fully_sharded(module := frame.f_locals["self"]):
            found.append(module)
        frame = frame.f_back
    return found


def map_tensors(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Values with each tensor in their tuples, lists, dicts and dataclasses replaced, as FSDP itself does."""
    return importlib.import_module("torch.distributed.utils")._apply_to_tensors(function, values)


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
    # A named tuple cannot be changed in place.
    ddp._join_config = ddp._join_config._replace(**settings)


Hooks = tuple[Callable[..., Any], Callable[..., Any]]
"""What packs a tensor that autograd saves, and what unpacks it."""


def saved_tensor_hooks() -> Hooks | None:
    """The pack and unpack hooks that are in force in this thread."""
    # False: none while a compiler traces, as torch itself asks.
    hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks


def all_saved_tensor_hooks() -> list[Hooks]:
    """Those that are in force in this thread, and behind them those that they cover."""
    found: list[Hooks] = []
    try:
        # torch shows the uppermost alone.
        while (hooks := saved_tensor_hooks()) is not None:
            found.append(hooks)
            torch._C._autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(found):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    return found


def function_modes() -> list[Any]:
    """The torch-function modes of this thread, outermost first."""
    return list(torch.overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def dispatch_modes() -> list[Any]:
    """The torch-dispatch modes of this thread, outermost first."""
    return list(dispatch._get_current_dispatch_mode_stack())


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """A context in which they see no operators."""
    # Without any there is nothing to do, and much to import.
    return dispatch._disable_current_modes() if dispatch_modes() else nullcontext()


def is_traced() -> bool:
    """Whether torch.jit.trace looks on."""
    # As torch.jit.is_tracing, which has no types.
    return torch._C._get_tracing_state() is not None


def is_watched() -> bool:
    """Whether a torch-dispatch mode or torch.jit.trace wants to see each operator that runs."""
    return torch._C._len_torch_dispatch_stack() > 0 or is_traced()


@contextmanager
def in_function_mode(mode: Any) -> Iterator[None]:
    """A context in which a torch-function mode is in force.

    The mode's own ``__enter__`` is not called: another thread has entered it, and some modes count how often.
    """
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
