"""What a thread knows about how tensors are to be computed, captured in one thread and entered in another.

torch keeps it by thread: grad and inference mode, autocast, saved-tensor hooks, function and dispatch modes (default
device among them), the current CUDA device and stream. Python keeps context variables. The default dtype is the
process's own. Tests check each kind of state.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch

from syncaccum.torch_private import (
    dispatch_modes,
    function_modes,
    in_dispatch_mode,
    in_function_mode,
    saved_tensor_hooks,
)


class ThreadState:
    """The state of the thread that makes it."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ]
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self._hooks = saved_tensor_hooks()
        self._function_modes = function_modes()
        self._dispatch_modes = dispatch_modes()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def run(self, function: Callable[[], None]) -> None:
        """Call a function in this thread as if in the thread that made the state."""
        # Asked, torch tells OpenMP in this thread, too.
        # Else convolutions take OMP_NUM_THREADS, however many torch uses.
        torch.get_num_threads()
        # A copy: only one thread at a time may be in a context.
        self._context.copy().run(self._run, function)

    def _run(self, function: Callable[[], None]) -> None:
        with ExitStack() as stack:
            for manager in self._managers():
                stack.enter_context(manager)
            function()

    def _managers(self) -> Iterator[Any]:
        if self._stream is not None:
            yield torch.cuda.device(self._stream.device)
            yield torch.cuda.stream(self._stream)
        yield torch.inference_mode(self._inference)
        yield torch.set_grad_enabled(self._grad)
        for kind, dtype in self._autocast:
            yield torch.autocast(kind, dtype, cache_enabled=self._autocast_cache)
        if self._hooks is not None:
            yield torch.autograd.graph.saved_tensors_hooks(*self._hooks)
        for mode in self._dispatch_modes:
            yield in_dispatch_mode(mode)
        for mode in self._function_modes:
            yield in_function_mode(mode)


class NoGraph:
    """No graph is recorded in this thread, between `enter` and `leave`: `torch.no_grad` for `run_under`."""

    def __init__(self) -> None:
        self._before = torch.is_grad_enabled()

    def enter(self) -> None:
        torch.set_grad_enabled(False)

    def leave(self) -> None:
        torch.set_grad_enabled(self._before)
