"""torch.utils.checkpoint inside lockstep: a second forward meets nobody, and uses what the first one found.

A checkpoint sets hooks that drop what its forward saves. When the backward asks for the first of it, the forward runs
again. One autograd node normalises all micro-batches: here each input is saved by its micro-batch's own hooks. Second
forwards run one at a time, in any order. Each finds its meeting again, normalises as it did, and saves its input.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from syncaccum.errors import LockstepError
from syncaccum.exact.known import KnownVisit, find_again
from syncaccum.exact.meeting_point import Meeting, apply_parameters, normalize_side_by_side
from syncaccum.exact.process_state import Eager, set_while_alive
from syncaccum.layer import surroundings
from syncaccum.layer.memory_order import make_dense
from syncaccum.layer.passes import apply_known
from syncaccum.layer.samples import distance, take_sample
from syncaccum.layer.state import Accumulating
from syncaccum.torch_private import Hooks, without_dispatch_modes


def is_checkpoint(hooks: Hooks) -> bool:
    """Whether hooks for saved tensors are those of a checkpoint in its first forward."""
    return getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__


def has_checkpoint(hooks: Iterable[Hooks]) -> bool:
    """Whether those that are in force in a thread, and those behind them, are inside of a checkpoint."""
    return any(is_checkpoint(pair) for pair in hooks)


class Checkpoints:
    """Those of one lockstep. As a participant it normalises in their second forwards.

    It lives until no second forward can come any more.
    """

    def __init__(self) -> None:
        self._firsts: dict[_Identity, _First] = {}
        self._names: dict[Accumulating, str] = {}
        self._taken: dict[tuple[Accumulating, int], KnownVisit] = {}

    def meet(self, meeting: Meeting) -> Callable[[int], Tensor]:
        """What to do at a meeting."""
        if not any(has_checkpoint(a.hooks) for a in meeting.arrivals):
            return normalize_side_by_side(meeting)
        visit = KnownVisit.of(meeting, [take_sample(a.x) for a in meeting.arrivals])
        self._names[visit.layer] = visit.name
        surroundings.recompute_by([visit.layer], self)
        for index, arrival in enumerate(meeting.arrivals):
            for pair in filter(is_checkpoint, arrival.hooks):
                self._note(visit, index, pair[1])
        inputs = _Inputs(self, visit, meeting)
        with torch.autograd.graph.saved_tensors_hooks(inputs.pack, unpack):
            return normalize_side_by_side(replace(meeting, reduce_sums=inputs.reduce_sums))

    def _note(self, visit: KnownVisit, index: int, unpack: _Unpack) -> None:
        """A micro-batch's checkpoint may come to this visit again."""
        # While anything waits for the backward in this checkpoint,
        # and be it not of our node.
        _owners[unpack] = self
        identity = _identify(unpack)
        first = self._firsts.get(identity)
        if first is None or first.unpack() is not unpack:
            first = self._firsts[identity] = _First(weakref.ref(unpack), index, [])
        first.visits.append(visit)

    def await_backward(self) -> None:
        """The forward is over. Second forwards run as the first ones did: not compiled."""
        if self._names:
            set_while_alive(Eager(), self)

    def is_repeated_now(self) -> bool:
        """Whether a checkpoint of this lockstep runs its second forward."""
        return self._find_running() is not None

    def _find_running(self) -> _First | None:
        """The innermost checkpoint that unpacks, which is when it runs again. Only the stack tells."""
        frame: FrameType | None = sys._getframe()
        codes = {identity[0] for identity in self._firsts}
        while frame is not None:
            if frame.f_code in codes:
                first = self._firsts.get(_identify_frame(frame))
                # Else another one may be where a dead one was.
                if first is not None and first.unpack() is not None:
                    return first
            frame = frame.f_back
        return None

    def normalize(
        self, layer: Accumulating, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, counts: bool
    ) -> Tensor:
        """The output in a second forward, the same as in the first."""
        first = self._find_running()
        assert first is not None  # is_repeated_now
        if not any(visit.layer is layer for visit in first.visits):
            raise LockstepError(f"layer {self._names[layer]} {_DIFFERS}")
        x = make_dense(x)
        with without_dispatch_modes():
            visit = first.visits[find_again(first.visits, layer, x, first.index)[0]]
            self._taken[layer, x.data_ptr()] = visit
            shared = (weight, bias) if visit.shares_parameters else (None, None)
            # What follows saves as the first forward did only if
            # the output wants a gradient as it did then.
            anchor = torch.empty(0, requires_grad=visit.wants_gradient)
            y: Tensor = _Again.apply(visit, x, *shared, anchor)  # type: ignore[no-untyped-call]
        return y if visit.shares_parameters else apply_parameters(y, weight, bias)

    def took(self, x: Tensor, visit: KnownVisit) -> bool:
        """Whether the second forward that gave this input took it to the right visit."""
        taken = self._taken.pop((visit.layer, x.data_ptr()), visit)
        # An empty one has no address; equal statistics do as well.
        return taken is visit or x.numel() == 0 or taken.equals(visit)


_Unpack = Callable[[Any], Any]

_owners: weakref.WeakKeyDictionary[_Unpack, Checkpoints] = weakref.WeakKeyDictionary()
"""Keeps them alive."""


@dataclass(frozen=True)
class _First:
    """A checkpoint in its first forward."""

    unpack: weakref.ref[_Unpack]
    """Weak: it holds what the checkpoint has kept."""
    index: int
    """Of its micro-batch."""
    visits: list[KnownVisit]


_Identity = tuple[CodeType, tuple[int, ...]]
"""Tells closures of one function apart: its code, and the addresses of what they hold."""


def _identify(function: Any) -> _Identity:
    return function.__code__, tuple(id(cell.cell_contents) for cell in function.__closure__ or ())


def _identify_frame(frame: FrameType) -> _Identity:
    """That of the function which runs in a frame."""
    return frame.f_code, tuple(id(frame.f_locals[name]) for name in frame.f_code.co_freevars)


class _Again(torch.autograd.Function):
    """A micro-batch's part of a meeting's node, in a second forward: the same output, the same input saved."""

    @staticmethod
    def forward(ctx, visit, x, weight, bias, anchor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.name = visit.name
        return apply_known(x, visit.measured(x), weight, bias, visit.norm, visit.vectors)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        raise LockstepError(f"a backward inside of a checkpoint comes to layer {ctx.name}: its sums would meet nobody")


class _Inputs:
    """What the node of a meeting saves: parameters as they are, each input by the hooks of its micro-batch."""

    def __init__(self, owner: Checkpoints, visit: KnownVisit, meeting: Meeting) -> None:
        first = meeting.arrivals[0]
        parameters = [p for p in (first.weight, first.bias) if p is not None and meeting.shares_parameters]
        hooks = [next(iter(a.hooks), None) for a in meeting.arrivals]
        # In the order in which the node saves them.
        self._coming: list[tuple[int, Hooks | None] | None] = [*[None] * len(parameters), *enumerate(hooks)]
        # Weak: the node holds this until its graph is gone.
        self._owner = weakref.ref(owner)
        self._visit = visit
        self._reduce_sums = meeting.reduce_sums
        self._give_up = meeting.give_up
        self._distances: list[Tensor] = []
        self._is_at_odds = False

    def pack(self, tensor: Tensor) -> Any:
        coming = self._coming.pop(0)
        if coming is None:
            return tensor
        index, hooks = coming
        owner = self._owner()
        assert owner is not None  # it packs
        if hooks is None:
            return _Input(self, owner, index, None, tensor, repeats=False)
        return _Input(self, owner, index, hooks[1], hooks[0](tensor), repeats=is_checkpoint(hooks))

    def unpack(self, saved: _Input) -> Tensor:
        try:
            x: Tensor = saved.kept if saved.unpack is None else saved.unpack(saved.kept)
        except torch.utils.checkpoint.CheckpointError as error:
            self._give_up()
            raise LockstepError(f"layer {self._visit.name} {_DIFFERS}") from error
        self._distances.append(distance(x, self._visit.samples[saved.index]))
        self._is_at_odds |= saved.repeats and not saved.owner.took(x, self._visit)
        return x

    def reduce_sums(self, sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Everyone's sums, once all inputs have come back, and only if they are the right ones. Collective."""
        distances, self._distances = self._distances, []
        # Not `<= 1`: NaN came of NaN in both.
        differs = bool((torch.stack(distances) > 1).any())
        if differs or self._is_at_odds:
            self._give_up()
            raise LockstepError(f"layer {self._visit.name} {_DIFFERS if differs else _ALIKE}")
        return sums if self._reduce_sums is None else self._reduce_sums(sums)


@dataclass(eq=False)
class _Input:
    """A micro-batch's input at a meeting, as its hooks have packed it."""

    inputs: _Inputs
    owner: Checkpoints
    index: int
    unpack: _Unpack | None
    kept: Any
    repeats: bool
    """Whether a second forward gives it back."""


def unpack(packed: Any) -> Tensor:
    """What the node of a meeting has saved."""
    tensor: Tensor = packed.inputs.unpack(packed) if isinstance(packed, _Input) else packed
    return tensor


_ALIKE = (
    "is visited several times in one checkpoint, with values that look alike: its second forward cannot tell them "
    "apart. Give each visit a checkpoint of its own. Gradients are wrong: zero_grad(), and do not step"
)
_DIFFERS = (
    "saw other values in a checkpoint's second forward than in the first: both must do the same. It may draw random "
    "numbers that torch.utils.checkpoint does not repeat, or depend on what has changed since. Gradients are wrong: "
    "zero_grad(), and do not step"
)
