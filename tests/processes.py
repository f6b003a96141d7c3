"""A process of this machine that answers through a pipe, started in milliseconds; and how a gloo rank begins in one."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

# forkserver: a fork of the test process hangs once OpenMP has run there, and spawn imports torch for every rank.
CONTEXT = multiprocessing.get_context("forkserver")
# torch imports _dynamo with the first optimizer; with all that train.py imports it takes four times as long as torch.
_EARLY = ["torch._dynamo", "torch.distributed", "torch.utils.tensorboard", "matplotlib.backends.backend_agg"]
CONTEXT.set_forkserver_preload([*_EARLY, "pytest", "hypothesis", "syncaccum", "launch.training"])


class PipedProcess:
    """Runs ``serve(pipe, *args)`` in a process, which ends when our end of the pipe does."""

    def __init__(self, serve: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=serve, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, *message: Any) -> None:
        # Plain pickle: the pipe's own would move tensors through shared memory, which dies with its process.
        with suppress(BrokenPipeError):  # it just died; `receive` says so
            self.pipe.send_bytes(pickle.dumps(message))

    def receive(self) -> Any:
        """The next answer.

        Raises:
            EOFError: the process died; its exit code is there.
        """
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise EOFError(f"died, exit code {self._process.exitcode}") from None

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Until it is gone; also if it was stopped, which SIGTERM would not end."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        if self.is_alive():
            self.kill()
        self.pipe.close()


def answer_requests(pipe: Connection, answer: Callable[..., bytes]) -> None:
    """In a process: send back ``answer``'s pickle for each message, until there is nobody to answer."""
    while True:
        try:
            message = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send_bytes(answer(*message))


def begin_rank(interface: str = "lo") -> None:
    """In a process: one thread, warnings are errors, and gloo on this interface."""
    gc.freeze()  # a collection need not walk what is imported
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if sys.platform == "linux":  # gloo otherwise asks for this machine's name, which need not resolve
        os.environ["GLOO_SOCKET_IFNAME"] = interface
