"""The doctor with something wrong on one rank: python -m tests.launch.altered_doctor ALTERATION RANK [OPTIONS]."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.torch_version import TorchVersion

import syncaccum
from syncaccum.doctor import __main__, measurement
from syncaccum.ranks.agreement import HEADER
from syncaccum.ranks.torch_transport import TorchTransport


def replace_versions() -> None:
    platform.python_version = lambda: "3.9.1"
    torch.__version__ = TorchVersion("2.6.0")
    syncaccum.__version__ = "0.0.1"


def spoil_sums() -> None:
    start_all_reduce = TorchTransport.start_all_reduce

    def spoiled(self: Any, flat: Tensor) -> Callable[[], None]:
        wait = start_all_reduce(self, flat)

        def spoil() -> None:
            wait()
            if flat.numel() > HEADER:  # sums, not the comparison of layers before them
                flat[-1] += flat[-1].abs() * 1e-6

        return spoil

    # Only in the commit: elsewhere it would spoil the ranks' notes to each other.
    measured = measurement.measure_commit_error

    def measure_commit_error(*args: Any, **kwargs: Any) -> float:
        with mock.patch.object(TorchTransport, "start_all_reduce", spoiled):
            return measured(*args, **kwargs)

    measurement.measure_commit_error = measure_commit_error


def stop_in_commit(with_signal: signal.Signals) -> None:
    def stop(*args: Any, **kwargs: Any) -> float:
        os.kill(os.getpid(), with_signal)
        raise AssertionError("a stopped process went on")

    measurement.measure_commit_error = stop


def leave_another_note() -> None:
    """Another program, which has found the doctor's store."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    ours = dist.PrefixStore("syncaccum.doctor/0", store)
    ours.set("facts/1/1", "__import__('os').abort()")
    ours.add("facts/told", 1)
    ours.wait(["facts/decision"])
    ours.add("facts/read", 1)
    os._exit(0)


ALTERATIONS: dict[str, Callable[[], None]] = {
    "versions": replace_versions,
    "note": leave_another_note,
    "sums": spoil_sums,
    "killed": lambda: stop_in_commit(signal.SIGKILL),
    "stopped": lambda: stop_in_commit(signal.SIGSTOP),
}

if __name__ == "__main__":
    alteration, rank, *options = sys.argv[1:]
    if os.environ["RANK"] == rank:
        ALTERATIONS[alteration]()
    __main__.main(options)
