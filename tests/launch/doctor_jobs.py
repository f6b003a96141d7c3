"""Runs of the doctor, with each rank's exit status and what it printed where."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

from tests.launch.jobs import CHECKOUT, find_free_port, make_environment
from tests.launch.warm import Program

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
    with _files(1) as [(out, err)]:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=CHECKOUT, env=make_environment(**changes), stdout=out, stderr=err
        )
        try:
            process.wait(_PATIENCE)
        finally:
            process.kill()
            process.wait()
        return Outcome(process.returncode, _read_all(out), _read_all(err))


def ranks(
    variables: Sequence[dict[str, str]], *options: object, module: Sequence[str] = DOCTOR, wait_for: Sequence[int] = ()
) -> list[Outcome]:
    """A process for each set of variables, as of a launcher that looks after none; all are killed in the end.

    Args:
        variables: RANK is the index and the rest those of one node of so many ranks, unless given here.
        options: of the doctor.
        module: what to run.
        wait_for: the processes that must end by themselves; all where empty.
    """
    port = str(find_free_port())
    usual = {"WORLD_SIZE": str(len(variables)), "LOCAL_WORLD_SIZE": str(len(variables)), "MASTER_ADDR": "127.0.0.1"}
    environments = []
    for rank, changes in enumerate(variables):
        given = {**usual, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port, **changes}
        environments.append(make_environment(**given))
    with _files(len(variables)) as files:
        programs = [
            Program((*module, *options), CHECKOUT, environment, *both)
            for environment, both in zip(environments, files, strict=True)
        ]
        deadline = time.monotonic() + _PATIENCE
        try:
            for index in wait_for or range(len(programs)):
                programs[index].wait(max(0.0, deadline - time.monotonic()))
        finally:
            for program in programs:
                program.kill()
        return [Outcome(program.status, *map(_read_all, both)) for program, both in zip(programs, files, strict=True)]


@contextmanager
def _files(count: int) -> Iterator[list[tuple[IO[str], IO[str]]]]:
    """For what each of so many processes prints, and for its errors."""
    with ExitStack() as stack:
        made = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2 * count)]
        yield list(zip(made[::2], made[1::2], strict=True))


def _read_all(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
