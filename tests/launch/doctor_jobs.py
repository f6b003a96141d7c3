"""Runs of the doctor, with each rank's exit status and what it printed where."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

from tests.launch.jobs import CHECKOUT, find_free_port, make_environment

_PATIENCE = 80.0
DOCTOR = ("-m", "syncaccum.doctor")


@dataclass(frozen=True)
class Outcome:
    """Of one process, or of torchrun and all of its ranks."""

    status: int
    stdout: str
    stderr: str

    @property
    def report(self) -> dict[str, Any]:
        """The JSON that was all of stdout."""
        parsed: dict[str, Any] = json.loads(self.stdout)
        return parsed

    def problems(self) -> list[dict[str, Any]]:
        return [finding for finding in self.report["findings"] if finding["severity"] == "problem"]


def torchrun(ranks: int, *options: object, module: Sequence[str] = DOCTOR, **changes: str) -> Outcome:
    """torchrun on this machine, to its end."""
    command = ["torchrun", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", ranks, *module, *options]
    return _run([([str(part) for part in command], changes)])[0]


def ranks(
    variables: Sequence[dict[str, str]], *options: object, module: Sequence[str] = DOCTOR, wait_for: Sequence[int] = ()
) -> list[Outcome]:
    """One process for each set of variables, as a launcher without an agent starts them; all are killed in the end.

    Args:
        variables: RANK is the index and the rest those of one node of so many ranks, unless given here.
        options: of the doctor.
        module: what to run.
        wait_for: the processes that must end by themselves; all where empty.
    """
    port = str(find_free_port())
    command = [sys.executable, *module, *(str(option) for option in options)]
    usual = {"WORLD_SIZE": str(len(variables)), "LOCAL_WORLD_SIZE": str(len(variables)), "MASTER_ADDR": "127.0.0.1"}
    commands = []
    for rank, changes in enumerate(variables):
        given = {**usual, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port, **changes}
        commands.append((command, given))
    return _run(commands, wait_for)


def _run(commands: Sequence[tuple[list[str], dict[str, str]]], wait_for: Sequence[int] = ()) -> list[Outcome]:
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        processes = [
            subprocess.Popen(command, cwd=CHECKOUT, env=make_environment(**changes), stdout=out, stderr=err)
            for (command, changes), (out, err) in zip(commands, files, strict=True)
        ]
        deadline = time.monotonic() + _PATIENCE
        try:
            for index in wait_for or range(len(processes)):
                processes[index].wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.wait()
        texts = [(_read_all(out), _read_all(err)) for out, err in files]
    return [Outcome(process.returncode, *both) for process, both in zip(processes, texts, strict=True)]


def _read_all(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
