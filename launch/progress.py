"""How far a run has come: its position in the data, the sums of the open epoch, and the epochs behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sums:
    """Sums over images of all ranks; adding those of two sets of images gives those of both."""

    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.loss + other.loss, self.correct + other.correct, self.images + other.images)

    @property
    def mean_loss(self) -> float:
        return self.loss / self.images

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


@dataclass(frozen=True)
class EpochRecord:
    """Means over the training images, as they went by, and over the test images afterwards."""

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass
class Progress:
    """``step`` optimizer steps into epoch ``epoch``, ``total_steps`` in all."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    sums: Sums = Sums()
    history: list[EpochRecord] = field(default_factory=list)
    seconds: float = 0.0

    def add_step(self, sums: Sums) -> None:
        self.step += 1
        self.total_steps += 1
        self.sums += sums

    def finish_epoch(self, test: Sums) -> EpochRecord:
        record = EpochRecord(self.sums.mean_loss, self.sums.accuracy, test.mean_loss, test.accuracy)
        self.history.append(record)
        self.epoch += 1
        self.step, self.sums = 0, Sums()
        return record

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Progress:
        history = [EpochRecord(**record) for record in state["history"]]
        return cls(**{**state, "sums": Sums(**state["sums"]), "history": history})
