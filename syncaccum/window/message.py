"""What ranks send each other: a header and their windows, in one message that is summed over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from syncaccum.ranks.agreement import HEADER, Fingerprint
from syncaccum.ranks.connect import connect
from syncaccum.ranks.groups import Group
from syncaccum.ranks.transport import Transport
from syncaccum.torch_private import is_watched
from syncaccum.window import spare
from syncaccum.window.fold import concatenate
from syncaccum.window.layers import NamedLayer
from syncaccum.window.layout import (
    describe_layout,
    message_size,
    propose_if_new,
    raise_layout_mismatch,
    verify_layout,
)
from syncaccum.window.taken import Taken


class Message:
    """The windows of a commit on their way, in one group.

    Args:
        call: what the ranks are about to do; they compare it.
        early: whether this is before the commit. More may come into the windows then, and stays there.
    """

    def __init__(
        self,
        group: Group,
        transport: Transport,
        members: Sequence[NamedLayer],
        call: str = "commit",
        *,
        early: bool = False,
    ) -> None:
        """Send it. Collective."""
        self.members = members
        self.layout = layout = describe_layout(members)
        self.taken: list[Taken] | None = None
        """What the commit takes from each window; None for all that is in it."""
        self._group, self._call = group, call
        self._memory: list[tuple[Hashable, Tensor]] = []
        self._fingerprint = layout.fingerprint if call == "commit" else layout.fingerprint.also(call)
        agree = propose_if_new(group, transport, members, layout, call)
        self.windows: Sequence[Tensor] = [layer._accumulation.window for _, layer in members]
        """This rank's part of the sums."""
        if early:
            self._keep(transport)
        if agree is None:
            wait = self._send(transport)
            self._receive: Callable[[Transport], Tensor] = lambda _: wait()
        else:
            self._receive = lambda now: agree(now) or self._send(now)()

    def receive(self, transport: Transport) -> Tensor:
        """A header and the windows, summed over the ranks. Collective, where the ranks had to compare layouts."""
        return self._receive(transport)

    def agrees(self, header: Sequence[float], ranks: int) -> bool:
        """Whether all ranks have sent this one."""
        return self._fingerprint.agrees(header, ranks)

    def raise_at_odds(self, transport: Transport) -> NoReturn:
        """Name what differs between the ranks. Collective."""
        raise_layout_mismatch(self._group, transport, self.members, self._call)

    def end(self) -> None:
        """Its memory may serve again. Not after an error, see `spare`."""
        for key, memory in self._memory:
            spare.give_back(key, memory)

    def _keep(self, transport: Transport) -> None:
        """Keep what is in the windows now."""
        size = self.layout.size - HEADER
        memory = self._take_memory(transport, ("kept", size), size)
        kept = concatenate(self.windows, self.windows[0].device, memory)
        self.windows = torch.split(kept, self.layout.sizes[1:])
        states = [layer._accumulation for _, layer in self.members]
        self.taken = [Taken.keep(state, window) for state, window in zip(states, self.windows, strict=True)]
        for state in states:
            state.is_sent = True

    def _send(self, transport: Transport) -> Callable[[], Tensor]:
        size = message_size(self._group, self.layout)
        memory = self._take_memory(transport, size, size)
        return _send(transport, self._fingerprint, size, self.windows, memory)

    def _take_memory(self, transport: Transport, key: Hashable, size: int) -> Tensor | None:
        """None where a message goes elsewhere than to the CPU: GPUs have an allocator that keeps some."""
        home = self.windows[0].device
        if home.type != "cpu" or transport.choose_device(home) != home or is_watched():
            return None
        memory: Tensor = spare.take(key, partial(_make_memory, size))
        self._memory.append((key, memory))
        return memory


def _make_memory(size: int) -> Tensor:
    # What is made under inference_mode refuses to change later.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.float64, device="cpu")


def _send(
    transport: Transport,
    fingerprint: Fingerprint,
    message_size: int,
    windows: Sequence[Tensor],
    memory: Tensor | None = None,
) -> Callable[[], Tensor]:
    """Begin to sum a header and these windows over the ranks. Collective.

    What is returned waits for the sums, and gives them on the device of the windows.
    """
    home = windows[0].device
    header = torch.tensor(fingerprint.header(), dtype=torch.float64, device=home)
    size = HEADER + sum(map(Tensor.numel, windows))
    # All messages of a group have one length: see verify_layout.
    padding = [header.new_zeros(message_size - size)] if size < message_size else []
    message = concatenate([header, *windows, *padding], transport.choose_device(home), memory)
    wait = transport.start_all_reduce(message)

    def receive() -> Tensor:
        wait()
        return message[:size].to(home)

    return receive


def reduce_for(call: str, group: Group, members: Sequence[NamedLayer]) -> list[Tensor]:
    """The windows of these layers summed over the ranks, for something else than a commit. Collective.

    Raises:
        LayoutMismatchError: some ranks call something else now.
    """
    transport = connect(group, call=call)
    layout, size = verify_layout(group, transport, members)
    # Not a commit's: a peer may commit now.
    fingerprint = Fingerprint.of(layout.key, call)
    windows = [layer._accumulation.window for _, layer in members]
    reduced = _send(transport, fingerprint, size, windows)()
    if not fingerprint.agrees(reduced[:HEADER].tolist(), transport.size):
        raise_layout_mismatch(group, transport, members, call)
    _, *sums = torch.split(reduced, layout.sizes)
    return sums
