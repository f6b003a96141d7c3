"""Sums over the ranks of a group, in messages that say what they are about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from syncaccum.errors import CommitError, LockstepError, TooFewValuesError
from syncaccum.layer.policies import ReduceSums
from syncaccum.layer.state import Accumulating, committed_mean
from syncaccum.moments import Moments, pack_statistics
from syncaccum.ranks.agreement import HEADER, Agreement, Fingerprint, agreement_of
from syncaccum.ranks.connect import connect, gather_texts
from syncaccum.ranks.groups import Group
from syncaccum.window.layers import NamedLayer
from syncaccum.window.layout import verify_layout


class Visit(NamedTuple):
    """One time that all micro-batches meet at a layer."""

    call: str
    """What brings them there: lockstep, or lookahead."""
    lockstep: tuple[int, int]
    """Which lockstep of this group it is in; lookaheads are counted among them."""
    number: int
    """How many visits came before, in this lockstep."""
    layer: str
    origin: int
    """A checksum of what the ranks subtract from their values: all must subtract the same."""

    def describe(self, direction: str) -> list[str]:
        """For ranks at odds: the call, the layer, and where in the lockstep that is."""
        return [
            self.call,
            self.layer,
            f"{direction} of meeting {self.number}, {self.call} {self.lockstep[1]}, running mean {self.origin:x}",
        ]


class Exchange:
    """The collectives of a lockstep, or of a lookahead, over one group.

    Ranks at different layers would send different sizes, which gloo answers with an abort or wrong sums. So all
    messages are as long as the group's longest, a commit's, and begin with a fingerprint of what they are about.
    """

    def __init__(self, group: Group, layers: Sequence[NamedLayer], call: str) -> None:
        self._call = call
        self._transport = connect(group, call=call)
        # Equal layers on all ranks make messages of equal size.
        _, self._size = verify_layout(group, self._transport, layers)
        self._agreement = Agreement() if group is None else agreement_of(group)
        self._lockstep = self._agreement.begin_lockstep()
        self._visits = 0

    @property
    def is_alone(self) -> bool:
        return self._transport.size == 1

    def statistics(
        self, layer: Accumulating, name: str, count: int, mean: Tensor, variance: Tensor
    ) -> tuple[Visit, Tensor | int, Tensor, Tensor]:
        """The next meeting, at this layer; everyone's count, mean and variance, from this rank's. Collective."""
        if self.is_alone:
            return self.visit_alone(name, count), max(count, 1), mean, variance
        self._visits += 1
        # With a large mean, sums of squares lose the variance.
        # So all subtract what all ranks have: the running mean.
        committed = committed_mean(layer)
        origin = torch.zeros_like(mean) if committed is None else committed
        # Bits add up to the same in any order.
        visit = self._visit(name, int(origin.view(torch.int64).sum()) % 2**64)
        mine = pack_statistics(count, mean - origin, variance)
        everyones = Moments.unpack(self._reduce(visit, "forward", mine))
        # A rank with two values need not wait for the device.
        if count < 2:
            self._refuse_one_value(name, int(everyones.count))
        # No value at all: nothing is divided.
        everyones = replace(everyones, count=everyones.count.clamp_min(1))
        return visit, everyones.count, everyones.mean + origin, everyones.variance

    def visit_alone(self, layer: str, count: int) -> Visit:
        """The next meeting, at this layer, with so many values, where this process is alone."""
        self._visits += 1
        self._refuse_one_value(layer, count)
        return self._visit(layer, 0)

    def _visit(self, layer: str, origin: int) -> Visit:
        return Visit(self._call, self._lockstep, self._visits, layer, origin)

    @staticmethod
    def _refuse_one_value(layer: str, count: int) -> None:
        if count == 1:
            raise TooFewValuesError(f"one value per channel in the whole global batch has no variance, in {layer}")

    def sums_of(self, visit: Visit) -> ReduceSums | None:
        """What a layer's backward sums with; None where this process is alone."""
        if self.is_alone:
            return None

        def reduce_sums(sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            first, second = self._reduce(visit, "backward", torch.cat(sums).to(torch.float64)).chunk(2)
            return first, second

        return reduce_sums

    def gather_numbers(self, about: str, mine: int) -> list[int]:
        """A number of every rank, in rank order. Collective."""
        size = self._transport.size
        numbers = torch.zeros(size, dtype=torch.float64)
        numbers[self._transport.rank] = mine
        visit = Visit(self._call, self._lockstep, 0, about, 0)
        # No message is longer than the group's.
        parts = [self._reduce(visit, "start", part) for part in torch.split(numbers, self._size - HEADER)]
        return [int(number) for number in torch.cat(parts).tolist()]

    def start_round(self, number: int, values: Tensor) -> Callable[[], Tensor]:
        """Begin to add up the float64 values of all ranks; what is returned waits for the sums. Collective."""
        visit = Visit(self._call, self._lockstep, number, f"round {number}", 0)
        first, *others = torch.split(values, self._size - HEADER)
        wait = self._start(visit, "backward", first)
        # One at a time: where ranks are at odds, none may be on its way.
        return lambda: torch.cat([wait(), *(self._reduce(visit, "backward", part) for part in others)])

    def give_up(self, number: int) -> None:
        """Tell peers, who are in a round or will be, that this rank does not go on. Collective, with their rounds."""
        visit = Visit(self._call, self._lockstep, number, "given up", 0)
        with suppress(LockstepError, CommitError):  # this rank has an error of its own, or none
            self._reduce(visit, "backward", torch.zeros(0, dtype=torch.float64))

    def _reduce(self, visit: Visit, direction: str, values: Tensor) -> Tensor:
        return self._start(visit, direction, values)()

    def _start(self, visit: Visit, direction: str, values: Tensor) -> Callable[[], Tensor]:
        if self.is_alone:
            return lambda: values
        about = Fingerprint.of(direction, *visit)
        device = self._transport.choose_device(values.device)
        # A header, the values, and zeros up to the common length.
        message = torch.zeros(self._size, dtype=torch.float64, device=device)
        message[:HEADER] = torch.tensor(about.header(), dtype=torch.float64)
        message[HEADER : HEADER + values.numel()] = values
        wait_for_sums = self._transport.start_all_reduce(message)

        def wait() -> Tensor:
            wait_for_sums()
            if not about.agrees(message[:HEADER].tolist(), self._transport.size):
                self._raise_at_odds(visit.describe(direction))
            return message[HEADER : HEADER + values.numel()].to(values.device)

        return wait

    def _raise_at_odds(self, here: list[str]) -> NoReturn:
        """Name where each rank is. Collective."""
        self._agreement.end_at_odds()
        everyones = gather_texts(self._transport, here, at_least=1)
        # Another call sends its name first, and then what it likes.
        places = [texts[1:] if texts[0] == here[0] else [texts[0], texts[0]] for texts in everyones]
        where = ", ".join(f"rank {rank} {layer}" for rank, (layer, _) in enumerate(places))
        details = "; ".join(detail for _, detail in places)
        raise LockstepError(
            f"ranks meet different layers: {where} ({details}). The forward must take the same way on all ranks, and "
            "all of them must walk its backward, or none"
        )
