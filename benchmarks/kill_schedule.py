"""1,000 commits in a job that is killed and restarted all along, against one that nobody disturbs.

A random rank is killed (SIGKILL) every 20 to 50 commits, in a forward, in a commit, between them, or while the
checkpoint is written. The others fail, and all start anew from the checkpoint, which is written in mid-window.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from ctypes import Array, c_int
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.report import Figure, publish
from launch.files import write_atomically
from syncaccum import CommitError, commit, convert_sync_accum, load_window_state_dict, window_state_dict
from tests.processes import CONTEXT, begin_rank

RANKS = 4
MICRO_BATCHES = 2
CHECKPOINT_EVERY = 10
SEED = 0

BETWEEN, FORWARD, COMMIT, CHECKPOINT = range(4)
MOMENTS = ("between", "in a forward", "in a commit", "in a checkpoint")
# How long each lasts, roughly, and so how long after its beginning the kill may come; seconds.
LASTS = (2e-3, 3e-3, 3e-3, 10e-3)
LOADING = 2e-3
"""Seconds that a micro-batch takes to come, as from a data loader: a time between, long enough to be hit."""

_LOST_A_PEER = 3
"""Exit status of a rank that a failing collective has ended, as it should."""
# Beyond any wait for a killed peer; a rank that needs longer hangs.
_PATIENCE = 60.0


@dataclass(frozen=True)
class Kill:
    """``rank`` dies so many seconds after the given moment of this commit has begun."""

    rank: int
    commit: int
    moment: int
    after: float


@dataclass
class Toll:
    """What the kills of a job have done."""

    by_moment: Counter[str] = field(default_factory=Counter)
    """Where the killed rank was, which may be past the moment that was aimed at."""
    done_again: int = 0
    slowest_survivor: float = 0.0
    """Seconds from a kill until the last other rank had failed."""


# --- in a rank ------------------------------------------------------------------------------------------------


def build_model() -> nn.Module:
    """Three layers in a chain: each sees what the ones before it made of their committed statistics."""
    torch.manual_seed(SEED)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32, momentum=None), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64)),
    )
    return convert_sync_accum(model)


def make_micro_batch(commit: int, rank: int, index: int) -> Tensor:
    """Of 2 to 5 images; the same ones whenever this step is done."""
    generator = torch.Generator().manual_seed((commit * RANKS + rank) * MICRO_BATCHES + index)
    drift = 1 + commit / 1000
    return drift + torch.randn(2 + (commit + rank) % 4, 3, 8, 8, generator=generator)


@dataclass
class _Rank:
    rank: int
    folder: Path
    commits: int
    kill: Kill | None
    killer: Connection
    where: Array[c_int]

    def run(self) -> None:
        self.model = build_model()
        start = self._load()
        for index in range(start, self.commits):
            for micro in range(1 if index == start and start > 0 else 0, MICRO_BATCHES):
                time.sleep(LOADING)
                x = make_micro_batch(index, self.rank, micro)
                self._enter(FORWARD, index)
                with torch.no_grad():
                    self.model(x)
                self._enter(BETWEEN, index)
                if micro == 0 and index > start and index % CHECKPOINT_EVERY == 0:
                    self._enter(CHECKPOINT, index)
                    self._save(index)
                    self._enter(BETWEEN, index)
            self._enter(COMMIT, index)
            commit(self.model)
            self._enter(BETWEEN, index)
        if self.rank == 0:
            self._write("end", {"model": self.model.state_dict(), "windows": window_state_dict(self.model)})

    def _enter(self, moment: int, index: int) -> None:
        self.where[self.rank] = moment
        kill = self.kill
        if kill is not None and (kill.rank, kill.commit, kill.moment) == (self.rank, index, moment):
            self.kill = None
            self.killer.send_bytes(b"here")

    def _save(self, index: int) -> None:
        """One micro-batch into window ``index``. Collective; rank 0 writes."""
        windows: list[Any] = [None] * RANKS
        dist.all_gather_object(windows, window_state_dict(self.model))
        if self.rank == 0:
            self._write("checkpoint", {"commit": index, "model": self.model.state_dict(), "windows": windows})

    def _write(self, name: str, state: dict[str, Any]) -> None:
        write_atomically(self.folder / name, lambda file: torch.save(state, file))

    def _load(self) -> int:
        if not (self.folder / "checkpoint").exists():
            return 0
        state = torch.load(self.folder / "checkpoint", weights_only=True)
        self.model.load_state_dict(state["model"])
        load_window_state_dict(self.model, state["windows"][self.rank])
        start: int = state["commit"]
        return start


def _serve(rank: int, store: str, *args: Any) -> None:
    begin_rank()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        _Rank(rank, *args).run()
    except (CommitError, RuntimeError):  # torch's own, where the ranks were gathering their windows
        # Without the interpreter's farewell, which may abort where gloo has lost a peer.
        os._exit(_LOST_A_PEER)
    dist.destroy_process_group()


# --- in the process that starts and kills them ------------------------------------------------------------------


def run_job(folder: Path, commits: int, plan: Callable[[int], Kill | None], toll: Toll) -> dict[str, Any]:
    """Start the ranks, kill one as planned, and again, until all commits are done; rank 0's end state.

    Args:
        plan: the kill for a start at this commit, or None.
    """
    attempt = 0
    while not (folder / "end").exists():
        start = _read_commit(folder)
        kill = plan(start)
        _run_attempt(folder, str(folder / f"store{attempt}"), commits, kill, toll)
        attempt += 1
        if kill is not None:
            toll.done_again += max(0, kill.commit - _read_commit(folder))
    state: dict[str, Any] = torch.load(folder / "end", weights_only=True)
    return state


def _read_commit(folder: Path) -> int:
    with suppress(FileNotFoundError):
        commit: int = torch.load(folder / "checkpoint", weights_only=True)["commit"]
        return commit
    return 0


def _run_attempt(folder: Path, store: str, commits: int, kill: Kill | None, toll: Toll) -> None:
    where = RawArray(c_int, RANKS)
    notice, killer = CONTEXT.Pipe(duplex=False)
    ranks = [
        CONTEXT.Process(target=_serve, args=(rank, store, folder, commits, kill, killer, where), daemon=True)
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    killer.close()
    expected = [0] * RANKS
    struck = time.monotonic()
    if kill is not None and _await_notice(notice, ranks):
        struck = _strike(ranks[kill.rank], kill.after)
        toll.by_moment[MOMENTS[where[kill.rank]]] += 1
        expected = [_LOST_A_PEER] * RANKS
        expected[kill.rank] = -signal.SIGKILL
    for process in ranks:
        process.join(_PATIENCE)
    if kill is not None:
        toll.slowest_survivor = max(toll.slowest_survivor, time.monotonic() - struck)
    codes = [process.exitcode for process in ranks]
    if codes != expected:
        raise RuntimeError(f"ranks ended with {codes}, expected {expected}; the kill was {kill}")


def _await_notice(notice: Connection, ranks: list[ForkServerProcess]) -> bool:
    """Whether the rank to be killed is where it is to be; not so if ranks have ended."""
    ready = wait([notice, *(process.sentinel for process in ranks)], _PATIENCE)
    with suppress(EOFError):
        return notice in ready and notice.recv_bytes() == b"here"
    return False


def _strike(process: ForkServerProcess, after: float) -> float:
    time.sleep(after)
    struck = time.monotonic()
    process.kill()
    return struck


def make_plan(commits: int, chance: random.Random) -> Callable[[int], Kill | None]:
    """A kill 20 to 50 commits after the last one, at each moment in turn, as long as there are commits to come."""
    last = 0
    kills = 0

    def plan(start: int) -> Kill | None:
        nonlocal last, kills
        last += chance.randint(20, 50)
        moment = kills % len(MOMENTS)
        kills += 1
        rank = chance.randrange(RANKS)
        if moment == CHECKPOINT:  # which rank 0 writes, at every tenth commit
            rank, last = 0, -(-last // CHECKPOINT_EVERY) * CHECKPOINT_EVERY
        if last >= commits:
            return None
        return Kill(rank, last, moment, chance.uniform(0.0, LASTS[moment]))

    return plan


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, bool]:
    """Largest difference between two end states, and whether they are the same bits."""
    worst, same = 0.0, True
    for part in ("model", "windows"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            worst = max(worst, (ours[part][name].double() - value.double()).abs().max().item())
            same &= ours[part][name].numpy().tobytes() == value.numpy().tobytes()
    return worst, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commits", type=int, default=1000)
    commits = parser.parse_args().commits
    toll = Toll()
    seconds = []
    ends = []
    for plan in (lambda start: None, make_plan(commits, random.Random(SEED))):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            ends.append(run_job(Path(folder), commits, plan, toll))
        seconds.append(time.monotonic() - began)
    worst, same = compare(ends[1], ends[0])
    tracked = min(int(v) for name, v in ends[1]["model"].items() if name.endswith("num_batches_tracked"))
    kills = sum(toll.by_moment.values())
    moments = ", ".join(f"{toll.by_moment[moment]} {moment}" for moment in MOMENTS)
    figures = [
        Figure("commits that the statistics have tracked", tracked, commits, at_least=True),
        Figure("kills, each followed by a restart of all ranks", kills, note=moments),
        Figure("commits done again after a restart", toll.done_again),
        # Sums over ranks are made in one order, so not even the last bit may differ.
        Figure(
            "largest difference from the undisturbed run", worst, 0.0, note="bit for bit" if same else "not bit for bit"
        ),
        Figure("slowest survivor to fail after a kill, s", toll.slowest_survivor, 2.0),
        Figure("time with kills, s", seconds[1], note=f"undisturbed {seconds[0]:.1f} s"),
    ]
    publish("kill_schedule", figures)
    if not same or any(figure.verdict == "MISSED" for figure in figures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
