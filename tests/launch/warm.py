"""Python programs in processes that have torch imported already: a start costs milliseconds, not two seconds.

They are forked from a server that ran nothing. For what a launcher, a shell or Python's own start does, use `jobs`.
"""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

import torch

from tests.launch.jobs import CHECKOUT, find_free_port, make_environment
from tests.processes import CONTEXT

_PATIENCE = 240.0  # as of `jobs`


class Program:
    """``python ARGUMENTS``, started; what it prints goes to two files, or to one."""

    def __init__(
        self,
        arguments: Sequence[object],
        folder: str | Path,
        environment: Mapping[str, str],
        out: IO[str],
        err: IO[str],
    ) -> None:
        # A connection takes a file's number to a process that does not inherit it.
        streams = [Connection(os.dup(file.fileno()), readable=False) for file in (out, err)]
        words = [str(argument) for argument in arguments]
        self._process = CONTEXT.Process(
            target=_run, args=(words, str(folder), dict(environment), *streams), daemon=True
        )
        self._process.start()
        for stream in streams:
            stream.close()

    @property
    def status(self) -> int:
        """Its exit status; a signal's number is negative."""
        status = self._process.exitcode
        assert status is not None, "it still runs"
        return status

    def wait(self, timeout: float) -> int:
        """The exit status, as of `subprocess`.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.status

    def kill(self) -> None:
        """Until it is gone."""
        self._process.kill()
        self._process.join()


def _run(arguments: list[str], folder: str, environment: dict[str, str], out: Connection, err: Connection) -> None:
    """As Python's own command line: ``-m MODULE ...`` or ``FILE ...``."""
    gc.freeze()  # a collection need not walk what is imported
    for number, stream in enumerate((out, err), 1):
        os.dup2(stream.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if arguments[0] == "-m":
        sys.path.insert(0, folder)
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent.absolute()))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def run(*arguments: object, folder: str | Path = CHECKOUT, **changes: str) -> subprocess.CompletedProcess[str]:
    """A program to its end; stdout and stderr together in ``stdout``."""
    with tempfile.TemporaryFile("w+") as file:
        program = Program(arguments, folder, make_environment(**changes), file, file)
        try:
            status = program.wait(_PATIENCE)
        finally:
            program.kill()
        file.seek(0)
        return subprocess.CompletedProcess([str(a) for a in arguments], status, file.read())


@contextmanager
def started_ranks(ranks: int, *arguments: object, folder: str | Path = CHECKOUT) -> Iterator[list[Program]]:
    """A program on so many ranks, as torchrun starts it; all are killed in the end. What they print is dropped."""
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        programs = [Program(arguments, folder, environment, nowhere, nowhere) for environment in _describe_ranks(ranks)]
        for program in programs:
            stack.callback(program.kill)
        yield programs


def run_ranks(ranks: int, *arguments: object, folder: str | Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    """A program on so many ranks, to its end: the first status that is not 0, and what all of them printed."""
    with tempfile.TemporaryFile("w+") as file:
        programs = [Program(arguments, folder, environment, file, file) for environment in _describe_ranks(ranks)]
        try:
            statuses = [program.wait(_PATIENCE) for program in programs]
        finally:
            for program in programs:
                program.kill()
        file.seek(0)
        status = next(filter(None, statuses), 0)
        return subprocess.CompletedProcess([str(a) for a in arguments], status, file.read())


def _describe_ranks(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    port = str(find_free_port())
    return [make_environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=port) for rank in range(ranks)]
