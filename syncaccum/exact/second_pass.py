"""The second pass of a lookahead: each micro-batch goes forward and backward on its own, with known statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from syncaccum.errors import CommitError, LockstepError
from syncaccum.exact.books import Account
from syncaccum.exact.exchange import Exchange
from syncaccum.exact.known import KnownVisit, find_again
from syncaccum.layer.samples import distance
from syncaccum.layer.state import Accumulating
from syncaccum.torch_private import runs_in_backward


class SecondPass:
    """The micro-batch that runs, as layers see it; and what each has paid.

    Args:
        visits: of the first pass, in order.
        count: of this rank's micro-batches.
        exchange_of: the collectives over a layer's group.
        in_step: whether forwards and backwards communicate, too. Then nothing of ours is on its way meanwhile.
    """

    def __init__(
        self,
        visits: Sequence[KnownVisit],
        count: int,
        exchange_of: Callable[[Accumulating], Exchange],
        *,
        in_step: bool = False,
    ) -> None:
        self._visits = visits
        self._count = count
        self._in_step = in_step
        totals = _read([visit.total for visit in visits])
        self._accounts = [Account(visit, total) for visit, total in zip(visits, totals, strict=True)]
        groups: dict[Exchange, list[Account]] = {}
        for visit, account in zip(visits, self._accounts, strict=True):
            groups.setdefault(exchange_of(visit.layer), []).append(account)
        self._rounds = [Rounds(exchange, accounts, count) for exchange, accounts in groups.items()]
        if in_step:
            self._refuse_unequal()
        self.index = 0
        """Of the micro-batch that runs."""
        self._position = 0
        self._wanted = self._walked = 0
        self._drift = [visit.norm.center.new_zeros(()) for visit in visits]

    def _refuse_unequal(self) -> None:
        """Raise on all ranks where one has fewer micro-batches: the others' forwards would wait for it."""
        for rounds in self._rounds:
            if len(set(rounds.numbers)) > 1:
                each = ", ".join(f"rank {rank} has {number}" for rank, number in enumerate(rounds.numbers))
                raise LockstepError(
                    "lookahead over a model under fully_shard, which gathers weights in each forward, needs as many "
                    f"micro-batches on each rank, and {each}: give ranks with fewer some more that are empty (N = 0), "
                    "or take lockstep"
                )

    def begin(self, index: int) -> None:
        """A micro-batch starts. Collective, in the background: its round's predecessor is sent."""
        self._set_silent(False)
        if index == 0:
            for rounds in self._rounds:
                rounds.sit_out()
        else:
            for rounds in self._rounds:
                rounds.start(self.index)
        self.index, self._position = index, 0
        self._wanted = self._walked = 0
        if self._in_step:
            for rounds in self._rounds:
                rounds.finish()
            self._set_silent(True)

    def end_forward(self) -> None:
        """It came through the forward. Collective: waits for what `begin` has sent."""
        self._set_silent(False)
        if self._position < len(self._visits):
            raise LockstepError(
                f"micro-batch {self.index} has finished without layer {self._visits[self._position].name}, to which it "
                f"came in the first pass: {_SAME}"
            )
        for rounds in self._rounds:
            rounds.finish()

    def check_walked(self) -> None:
        """Raise where the micro-batch had gradients, and no backward came to a layer."""
        if self._wanted and not self._walked:
            raise LockstepError(
                f"lookahead: micro-batch {self.index} was not walked backward before the next: call backward() on each "
                "result before you take the next one, in `for loss in lookahead(...): loss.backward()`"
            )

    @property
    def is_last(self) -> bool:
        """Whether no micro-batch comes after this one."""
        return self.index == self._count - 1

    @property
    def is_complete(self) -> bool:
        """Whether this was the last micro-batch, and it was walked backward, if it could be."""
        return self.is_last and (not self._wanted or self._walked > 0)

    def end(self) -> None:
        """All are walked. Collective where there are peers: all raise where values of any were others."""
        far = self._find_drifted()
        elsewhere = [rank for rounds in self._rounds for rank in rounds.end(far is not None)]
        if far is not None or elsewhere:
            where = "on this rank" if far is not None else f"on rank {elsewhere[0]}"
            layer = "its layers" if far is None else f"layer {far.name}"
            raise LockstepError(
                f"lookahead: values at {layer} were not those of the first pass, {where}: {_SAME}. It may draw random "
                "numbers from a generator that is not torch's, Python's, NumPy's, or an attribute of a module. "
                "Gradients are wrong: zero_grad(), and do not step"
            )

    def begin_reduction(self) -> None:
        """A backward is next that communicates. Collective: all came so far."""
        for rounds in self._rounds:
            rounds.begin_reduction(self.index)

    def _set_silent(self, is_silent: bool) -> None:
        for rounds in self._rounds:
            rounds.is_silent = is_silent

    def give_up(self) -> None:
        """This rank does not go on: tell its peers. Collective, with their rounds."""
        # They came through this backward, too, and are in the next round.
        if self._walked and not self.is_last:
            self._set_silent(False)
        for rounds in self._rounds:
            # Peers may have given up, too.
            with suppress(LockstepError, CommitError):
                rounds.give_up()

    def normalize(
        self, layer: Accumulating, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, counts: bool
    ) -> Tensor:
        """The output at the next visit; in a checkpoint's second forward, at the one that it repeats."""
        number = self._find_again(layer, x) if runs_in_backward() else self._go_on(layer, x)
        visit, account, index = self._visits[number], self._accounts[number], self.index
        # Not x: the graph would hold it until the next result is there.
        samples = x.shape[0]

        def pay(sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            self._walked += 1
            return account.pay(index, samples, self._count - index, sums)

        y = visit.normalize(x, weight, bias, pay)
        self._wanted += y.requires_grad
        return y

    def is_repeated_now(self) -> bool:
        """Yes: of lookaheads one runs at a time, and every second forward is taken for one of its."""
        return True

    def _go_on(self, layer: Accumulating, x: Tensor) -> int:
        number = self._position
        if number == len(self._visits) or self._visits[number].layer is not layer:
            before = "the end" if number == len(self._visits) else f"layer {self._visits[number].name}"
            name = next((visit.name for visit in self._visits if visit.layer is layer), type(layer).__name__)
            raise LockstepError(
                f"micro-batch {self.index} comes to layer {name}, where it came to {before} in the first pass: {_SAME}"
            )
        visit = self._visits[number]
        if x.numel() // x.shape[1] != visit.counts[self.index]:
            raise LockstepError(
                f"micro-batch {self.index} comes to layer {visit.name} with other values than in the first "
                f"pass: {_SAME}"
            )
        # Looked at in the end: a GPU need not be waited for.
        self._drift[number] = torch.maximum(self._drift[number], distance(x, visit.samples[self.index]))
        self._position += 1
        return number

    def _find_again(self, layer: Accumulating, x: Tensor) -> int:
        """The visit that a checkpoint repeats."""
        number, drift = find_again(self._visits, layer, x, self.index)
        # It may repeat another forward than ours.
        self._drift[number] = torch.maximum(self._drift[number], drift)
        return number

    def _find_drifted(self) -> KnownVisit | None:
        """The first visit whose values were others than in the first pass."""
        if not self._visits:
            return None
        # Not `<= 1`: NaN came of NaN in both passes.
        device = self._drift[0].device
        far = (torch.stack([drift.to(device) for drift in self._drift]) > 1).tolist()
        return self._visits[far.index(True)] if any(far) else None


def _read(counts: Sequence[Tensor | int]) -> list[float]:
    """Numbers that may be on a device. One tolist() for all: each waits for a GPU."""
    tensors = [count for count in counts if isinstance(count, Tensor)]
    found = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(found) if isinstance(count, Tensor) else float(count) for count in counts]


_SAME = "forward must do the same in both passes, for the same micro-batch"


class Rounds:
    """The messages of one group: after each micro-batch, the sums of all its layers.

    Ranks with fewer micro-batches sit the first rounds out. So all have their last one together, in which
    DistributedDataParallel reduces gradients and waits for all.
    """

    def __init__(self, exchange: Exchange, accounts: Sequence[Account], count: int) -> None:
        self._exchange = exchange
        self._accounts = accounts
        self.numbers = exchange.gather_numbers("micro-batches", count)
        """Of micro-batches, by rank."""
        self._offset = max(self.numbers) - count
        self._open: tuple[int | None, Callable[[], Tensor]] | None = None
        self._number = 0
        self.is_silent = False
        """Whether peers do not wait for a message of ours: they are in another one, or have given up."""

    def sit_out(self) -> None:
        """The rounds before this rank's first micro-batch. Collective."""
        for number in range(self._offset):
            self._start(number, None)
            self.finish()

    def start(self, index: int) -> None:
        """Send the sums of a micro-batch that was walked. Collective."""
        self._start(self._offset + index, index)

    def begin_reduction(self, index: int) -> None:
        """Find out whether all ranks came through their last forward. Collective."""
        # Whatever comes of it, peers do not wait for a round then.
        # A message would meet gradients, which gloo answers with an abort.
        self.is_silent = True
        if not self._exchange.is_alone:
            self._exchange.gather_numbers("last backward", index)

    def end(self, has_drifted: bool) -> list[int]:
        """The ranks whose values were others than in the first pass. Collective. Nobody needs the last sums."""
        self.is_silent = True
        if self._exchange.is_alone:
            return []
        return [rank for rank, number in enumerate(self._exchange.gather_numbers("end", has_drifted)) if number]

    def _start(self, number: int, index: int | None) -> None:
        values = torch.cat([account.packed(index) for account in self._accounts])
        self._open = index, self._exchange.start_round(number, values)
        self._number = number + 1

    def finish(self) -> None:
        """Wait for the round that was started, if any, and put it into the books. Collective."""
        if self._open is None:
            return
        (index, wait), self._open = self._open, None
        # A failure here is known to the peers.
        self.is_silent = True
        parts = torch.split(wait(), [account.size for account in self._accounts])
        self.is_silent = False
        counts = torch.stack([part[0] for part in parts]).tolist()
        for account, part, count in zip(self._accounts, parts, counts, strict=True):
            account.close_round(index, part[1:], count)

    def give_up(self) -> None:
        """Tell peers that this rank does not go on. Collective, with their next round."""
        if self._open is not None:
            self.finish()
        if not (self.is_silent or self._exchange.is_alone):
            self.is_silent = True
            self._exchange.give_up(self._number)
