"""A pool of rank processes, started once per test run, that run a test's body on N gloo ranks.

A body is a module-level function; the processes find it by name. Its process group is fresh, met through a file, so
tests share nothing and need no port.
"""

from __future__ import annotations

import datetime
import functools
import gc
import inspect
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import PipedProcess, answer_requests, begin_rank

# Longer than any group timeout in use, so that a rank that waits in a collective can still say so.
_PATIENCE = 60.0
# For a rank that is to be lost to show that it is not, also on a busy machine; a stopped one takes all of it.
_GRACE = 1.0


@dataclass(frozen=True)
class Rank:
    """Who a body runs as. ``folder`` is empty at first and the same for all ranks of the group."""

    index: int
    size: int
    folder: Path


class RankError(AssertionError):
    """A body failed, died or hung on some rank; the message has every rank's story."""


def on_ranks(size: int, *, timeout: float = 30.0, lost: Collection[int] = ()) -> Callable[..., Any]:
    """Turn ``def test_x(rank: Rank, ...)`` into a test whose body runs on ``size`` ranks.

    Args:
        size: how many ranks.
        timeout: of the process group, in seconds.
        lost: ranks that the body kills or stops; only those may fail to return, and they must.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        # pytest provides what is in the signature, and `rank` comes from the pool.
        _, *provided = inspect.signature(body).parameters.values()

        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            __tracebackhide__ = True
            with open_ranks(size, timeout=timeout) as ranks:
                ranks.run(body, *(arguments[parameter.name] for parameter in provided), lost=lost)

        test.__signature__ = inspect.Signature(provided)  # type: ignore[attr-defined]
        return test

    return decorate


def run_on_ranks(
    body: Callable[..., Any], size: int, *args: Any, timeout: float = 30.0, patience: float = _PATIENCE
) -> list[Any]:
    """``body(rank, *args)`` on ``size`` ranks; the results in rank order. It must end within ``patience`` seconds."""
    with open_ranks(size, timeout=timeout) as ranks:
        return ranks.run(body, *args, patience=patience)


@contextmanager
def open_ranks(size: int, *, timeout: float = 30.0) -> Iterator[Ranks]:
    """``size`` ranks that stay in one group for several runs, because joining one takes 30 ms and a run 1 ms."""
    ranks = Ranks(size, timeout)
    try:
        yield ranks
    finally:
        ranks.leave()


class Ranks:
    """The ranks of one process group; see :func:`open_ranks`."""

    def __init__(self, size: int, timeout: float) -> None:
        self._size = size
        self._timeout = timeout
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self, body: Callable[..., Any], *args: Any, lost: Collection[int] = (), patience: float = _PATIENCE
    ) -> list[Any]:
        """``body(rank, *args)`` on every rank; the results in rank order, None for the lost ones.

        Raises:
            RankError: the body raised, died or did not end within ``patience`` seconds on some rank, or returned
                on one that was to be lost. The next run gets a new group and healthy processes.
        """
        __tracebackhide__ = True
        replies = self._call(body, args, lost, patience)
        if lost or any(reply.story for reply in replies):
            self.leave()
        as_planned = (r.silent if i in lost else not r.story for i, r in enumerate(replies))
        if not all(as_planned):
            stories = (f"--- rank {i}: {reply.story or 'returned'}" for i, reply in enumerate(replies))
            raise RankError("\n".join([f"{body.__name__} failed on {self._size} ranks", *stories]))
        return [reply.result for reply in replies]

    def leave(self) -> None:
        """Leave the group; the next run joins a new one."""
        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        with folder:
            _call_each(_leave_group, [()] * self._size, (), _PATIENCE)

    def _call(
        self, body: Callable[..., Any], args: tuple[Any, ...], lost: Collection[int], patience: float
    ) -> Sequence[_Reply]:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            ranks = self._describe_ranks(self._folder)
            joined = _call_each(_join_group, [(rank, self._timeout) for rank in ranks], (), _PATIENCE)
            if any(reply.story for reply in joined):
                return joined
        ranks = self._describe_ranks(self._folder)
        return _call_each(body, [(rank, *args) for rank in ranks], lost, patience)

    def _describe_ranks(self, folder: tempfile.TemporaryDirectory[str]) -> list[Rank]:
        return [Rank(index, self._size, Path(folder.name)) for index in range(self._size)]


# --- in the test process: the pool ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reply:
    """What came of a call on one rank: its result, or the story of why there is none.

    ``silent`` tells a process that died or hung from one that raised.
    """

    result: Any = None
    story: str = ""
    silent: bool = False


_processes: dict[int, PipedProcess] = {}


def _call_each(
    function: Callable[..., Any], args: Sequence[tuple[Any, ...]], lost: Collection[int], patience: float
) -> Sequence[_Reply]:
    """Call a function on each of the first processes of the pool, all at once, and kill those that do not answer."""
    replies: dict[int, _Reply] = {}
    try:
        for index, arguments in enumerate(args):
            if index not in _processes or not _processes[index].is_alive():
                _processes[index] = PipedProcess(_serve)
            _processes[index].send(function.__module__, function.__qualname__, arguments)
        everyone = set(range(len(args)))
        _collect(replies, everyone - set(lost), patience)
        _collect(replies, everyone, _GRACE if lost else 0.0)
    finally:
        for index in range(len(args)):
            if index in _processes and (index not in replies or replies[index].silent):
                _processes.pop(index).close()
    unanswered = _Reply(story="did not answer", silent=True)
    return [replies.get(index, unanswered) for index in range(len(args))]


def _collect(replies: dict[int, _Reply], awaited: Collection[int], patience: float) -> None:
    """Add the replies of these ranks, as many as come in time."""
    deadline = time.monotonic() + patience
    while pipes := {_processes[index].pipe: index for index in awaited if index not in replies}:
        ready = wait(list(pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for pipe in ready:
            index = pipes[pipe]
            try:
                replies[index] = _processes[index].receive()
            except EOFError as error:
                replies[index] = _Reply(story=str(error), silent=True)


# --- in a rank process ----------------------------------------------------------------------------------------


def _serve(pipe: Connection) -> None:
    begin_rank()
    answer_requests(pipe, _answer)


def _answer(module: str, name: str, args: tuple[Any, ...]) -> bytes:
    try:
        function = inspect.unwrap(getattr(import_module(module), name))
        return pickle.dumps(_Reply(function(*args)))
    except BaseException:  # pytest's failures are no Exceptions
        story = traceback.format_exc()
    # Peers that wait for this rank learn at once that it is gone, if no frame of the traceback holds the group.
    gc.collect()
    _leave_group()
    return pickle.dumps(_Reply(story=story))


def _join_group(rank: Rank, timeout: float) -> None:
    torch.manual_seed(0)  # the same on every rank
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rank.folder}/rendezvous",
        rank=rank.index,
        world_size=rank.size,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
