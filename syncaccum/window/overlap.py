"""commit_on_step(overlap=True): windows that go to the other ranks when the last micro-batch's backward begins.

The all-reduce of a commit then runs beside the backward. The order of all collectives must be the same on all ranks.
So this one comes before DDP's first: a hook on the outputs of DDP's forward sends it, and each gradient of DDP's
parameters comes later in that backward. And no rank sends early before it knows that all of them do: the first commit
in a group compares that, as it compares layouts. Later ones have it in their header.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from syncaccum.errors import CommitError
from syncaccum.layer import surroundings
from syncaccum.layer.state import match_width
from syncaccum.ranks.connect import connect
from syncaccum.ranks.groups import Group
from syncaccum.torch_private import number_of_backward, tensors_in
from syncaccum.window.layers import NamedLayer, by_group
from syncaccum.window.message import Message

CALL = "commit with overlap=True"
"""What ranks are told of such a commit, so that others find themselves at odds."""


class Overlap:
    """What one ``commit_on_step`` has on its way, by group."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._messages: dict[Group, Message | CommitError | None] = {}
        """None for one that was dropped."""
        self.layers: Sequence[NamedLayer] | None = None
        """Of which model something is on its way: the walk over it takes long."""
        self._remarks: dict[str, str] = {}
        self._said: set[str] = set()
        # Weak: a new group has agreed on nothing yet.
        self._agreed: weakref.WeakSet[Any] = weakref.WeakSet()
        _all.add(self)

    def start(self, layers: Sequence[NamedLayer]) -> None:
        """Send the windows, in each group that is known to do so on all ranks. Collective.

        What is on its way already is dropped: the step was skipped, or there was another backward before it.
        """
        # Ranks without inputs take part in commits alone.
        if surroundings.open_join() is not None:
            return
        for group, members in by_group(layers).items():
            if group in self._agreed:
                self.layers = layers
                # First: an interrupt must not leave the one before.
                self._messages[group] = None
                self._messages[group] = self._try_to_send(group, members)

    def _try_to_send(self, group: Group, members: Sequence[NamedLayer]) -> Message | CommitError:
        try:
            return Message(group, connect(group, self._timeout), members, CALL, early=True)
        except CommitError as error:
            # The step raises it, as it does without overlap.
            return error

    def take(self, group: Group, members: Sequence[NamedLayer]) -> Message | None:
        """What was sent of these layers; None if it is still to be sent. Raises what went wrong on the way."""
        if group in self._agreed and group not in self._messages:
            self._remarks["late"] = _LATE
        message = self._messages.pop(group, None)
        if isinstance(message, CommitError):
            raise message
        # Changed since: then they are other layers.
        if message is None or _layers(message.members) != _layers(members):
            return None
        self._look_for_changes(message)
        return message

    def _look_for_changes(self, message: Message) -> None:
        remarks: dict[str, str] = {}
        for (name, layer), taken in zip(message.members, message.taken or (), strict=True):
            state = layer._accumulation
            match_width(layer)
            if state.window.numel() != taken.window.numel():
                raise CommitError(
                    f"the channels of layer {name} were pruned or added when its window was on its way to the other "
                    "ranks, which have committed it: do that after the step"
                )
            if not state.is_sent:
                remarks.setdefault("dropped", _DROPPED.format(name))
            elif state.micro_batches != taken.micro_batches:
                remarks.setdefault("more", _MORE.format(name))
        self._remarks |= remarks

    def note_agreed(self, group: Group) -> None:
        """All ranks of the group overlap."""
        if group is not None:
            self._agreed.add(group)

    def end(self) -> None:
        """A commit is done, or has failed. Say what was remarkable, each thing once."""
        self.layers = None
        new = {key: text for key, text in self._remarks.items() if key not in self._said}
        self._remarks.clear()
        self._said |= new.keys()
        for text in new.values():
            warnings.warn(text, stacklevel=2)

    def forget(self) -> None:
        """Drop all that is on its way."""
        self._messages.clear()
        self.layers = None

    def drop(self, layers: set[nn.Module]) -> None:
        """Drop what was sent of these."""
        for group, message in self._messages.items():
            if isinstance(message, Message) and not layers.isdisjoint(_layers(message.members)):
                self._messages[group] = self.layers = None


_LATE = (
    "commit_on_step(overlap=True): nothing had sent the windows when the step came, so the step did. Pass it the "
    "DistributedDataParallel itself; without one, and with lockstep, call handle.start_commit() on all ranks between "
    "the last micro-batch's forward and its backward; with lookahead leave overlap out"
)
_MORE = (
    "a training forward came when the window was on its way to the other ranks (layer {}, the first such): its "
    "micro-batch goes into the next window. With overlap=True no forward that counts may come between the last "
    "backward and the step; run it before, or inside not_counted(model)"
)
_DROPPED = (
    "a window was dropped when it was on its way to the other ranks (layer {}, the first such): what they had of it "
    "was committed, on all ranks. With overlap=True call discard(model) before the last micro-batch's backward"
)


def _layers(members: Sequence[NamedLayer]) -> list[nn.Module]:
    return [layer for _, layer in members]


def drop_what_was_sent(layers: Sequence[NamedLayer], *, but: Overlap | None) -> None:
    """Before a commit of these: what other commits have sent of them is not to be counted twice.

    Commits are collective, so this happens on all ranks alike.
    """
    for other in list(_all):
        if other is not but:
            other.drop(set(_layers(layers)))


_all: weakref.WeakSet[Overlap] = weakref.WeakSet()


class Watch:
    """A forward hook of DDP that has something called when the backward begins which reduces the gradients."""

    def __init__(self, begin: weakref.WeakMethod[Any] | None = None) -> None:
        self._begin = begin
        self._last = -1

    def __reduce__(self) -> tuple[Any, ...]:
        # The hook of a copied model: it does nothing.
        return Watch, ()

    def __call__(self, ddp: DistributedDataParallel, _: Any, output: Any) -> None:
        # As DDP asks, in its forward, whether to reduce.
        if self._begin is None or not (ddp.require_backward_grad_sync and torch.is_grad_enabled()):
            return
        # Their own collectives run in the backward.
        if surroundings.lockstep_here() is not None:
            return
        hook = self._make_hook()
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _make_hook(self) -> Callable[[Tensor], None]:
        is_done = False

        def hook(_: Tensor) -> None:
            nonlocal is_done
            backward, begin = number_of_backward(), None if self._begin is None else self._begin()
            # Once for all outputs, and for all forwards of one backward.
            if not is_done and backward != self._last and begin is not None:
                begin()
            is_done, self._last = True, backward

        return hook


def watch(model: nn.Module, begin: Callable[[], None]) -> list[RemovableHandle]:
    """Call this method at the beginning of each backward that reduces gradients, of each DDP in a model."""
    hook = Watch(weakref.WeakMethod(begin))
    # torch.compile would trace it together with the forward.
    return [
        module.register_forward_hook(hook) for module in model.modules() if isinstance(module, DistributedDataParallel)
    ]
