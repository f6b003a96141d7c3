"""One rank on each node, in a process of its own that the test asks, kills, stops, and replaces."""

from __future__ import annotations

import pickle
import tempfile
import traceback
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.faults.job import Job
from tests.faults.nodes import INTERFACE, Network, Node, enter, open_network
from tests.processes import PipedProcess, answer_requests, begin_rank

# Beyond any timeout in use: a rank that has not answered by then hangs.
_PATIENCE = 40.0


@dataclass(frozen=True)
class _Word:
    """What a rank tells on its way to an answer."""

    text: str


@dataclass(frozen=True)
class _Failure:
    story: str


class RankProcess(PipedProcess):
    """A rank and the pipes to it, which no fault of the network touches. It ends when they do."""

    def __init__(self, node: Node) -> None:
        super().__init__(_serve, node.index, node.namespace)
        self.node = node
        self._words: deque[str] = deque()
        self._questions = 0

    def ask(self, name: str, *args: Any) -> Any:
        self.post(name, *args)
        return self.answer()

    def post(self, name: str, *args: Any) -> None:
        self._words.clear()
        self._questions += 1
        self.send(name, args)

    def await_word(self, text: str) -> None:
        """Until the rank has told this, on its way to an answer."""
        while text not in self._words:
            word = self.receive()
            assert isinstance(word, _Word), f"rank {self.node.index} answered {word} and never was {text}"
            self._words.append(word.text)

    def answer(self) -> Any:
        while isinstance(reply := self.receive(), _Word):
            self._words.append(reply.text)
        self._questions -= 1
        assert not isinstance(reply, _Failure), f"rank {self.node.index} failed:\n{reply.story}"
        return reply

    def receive(self) -> Any:
        assert self.pipe.poll(_PATIENCE), f"rank {self.node.index} did not answer in {_PATIENCE} s"
        return super().receive()

    @property
    def ready(self) -> bool:
        """Alive, and with no question open."""
        return self.is_alive() and self._questions == 0


class Crew:
    """The ranks of a job, rank r on node r. A group of theirs is met through a file, and needs no network."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.ranks = [RankProcess(node) for node in network.nodes]
        self._folder = folder
        self._groups = 0

    def start(self, timeout: float, commits: int = 1) -> None:
        """All ranks in a new group, their models with this many commits behind them."""
        self.ask("start_over")
        self.meet(timeout)
        for step in range(commits):
            outcomes = self.ask("step", step)
            assert not any(outcome.error for outcome in outcomes), outcomes

    def meet(self, timeout: float, members: Collection[int] | None = None) -> None:
        """These ranks, or all, leave their group for a new one."""
        indices = list(range(len(self.ranks))) if members is None else sorted(members)
        self._groups += 1
        self.ask("leave", members=indices)
        for rank, index in enumerate(indices):
            self.ranks[index].post("join", str(self._folder / f"group{self._groups}"), rank, len(indices), timeout)
        self.answers(indices)

    def ask(self, name: str, *args: Any, members: Collection[int] | None = None) -> list[Any]:
        """The answers of these ranks, or of all, who work side by side."""
        self.post(name, *args, members=members)
        return self.answers(members)

    def post(self, name: str, *args: Any, members: Collection[int] | None = None) -> None:
        for rank in self._choose(members):
            rank.post(name, *args)

    def await_word(self, text: str) -> None:
        for rank in self.ranks:
            rank.await_word(text)

    def answers(self, members: Collection[int] | None = None) -> list[Any]:
        return [rank.answer() for rank in self._choose(members)]

    def _choose(self, members: Collection[int] | None) -> list[RankProcess]:
        return [rank for rank in self.ranks if members is None or rank.node.index in members]

    def restore(self) -> None:
        """Good weather, and every rank ready for a question, whatever was done to them."""
        self.network.clear_up()
        for rank in list(self.ranks):
            if not rank.ready or rank.node is not self.network.nodes[rank.node.index]:
                self.replace(rank.node.index)

    def replace(self, index: int) -> None:
        """A new process in the place of this rank's."""
        self.ranks[index].close()
        self.ranks[index] = RankProcess(self.network.nodes[index])

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


@contextmanager
def open_crew(size: int) -> Iterator[Crew]:
    with open_network(size) as network, tempfile.TemporaryDirectory() as folder:
        crew = Crew(network, Path(folder))
        try:
            yield crew
        finally:
            crew.close()


# --- in a rank's process --------------------------------------------------------------------------------------


def _serve(pipe: Connection, node: int, namespace: Path) -> None:
    enter(namespace)
    begin_rank(INTERFACE)
    job = Job(node, lambda text: pipe.send_bytes(pickle.dumps(_Word(text))))

    def answer(name: str, args: tuple[Any, ...]) -> bytes:
        try:
            return pickle.dumps(getattr(job, name)(*args))
        except Exception:
            return pickle.dumps(_Failure(traceback.format_exc()))

    answer_requests(pipe, answer)
