"""Commands of the checkout, run for the tests as a user's shell would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
LOCAL = "launch/torchrun_local.sh"
MULTINODE = "launch/torchrun_multinode.sh"
MPIRUN = "launch/mpirun.sh"
_PATIENCE = 240.0  # a busy machine took 100 seconds for what takes 20


def make_environment(**changes: str) -> dict[str, str]:
    """The environment of a user's shell with the virtual environment active, one thread for each rank."""
    beside_python = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{beside_python}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def run(*command: object, folder: str | Path = CHECKOUT, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder to its end; stdout and stderr together in ``stdout``."""
    words = [str(part) for part in command]
    with started(words, folder=folder, **changes) as process:
        output, _ = process.communicate(timeout=_PATIENCE)
    return subprocess.CompletedProcess(words, process.returncode, output)


@contextmanager
def started(
    command: Sequence[str], *, folder: str | Path = CHECKOUT, **changes: str
) -> Iterator[subprocess.Popen[str]]:
    """A running command; if it still runs in the end, it is told to stop as by a user's Ctrl-C."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=make_environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # torchrun passes it on to its ranks
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
            process.kill()
        process.communicate()


def find_children(process: int) -> list[int]:
    """The processes that a process has started and that still run. Linux only."""
    children = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in children for child in file.read_text().split()]


def find_free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
