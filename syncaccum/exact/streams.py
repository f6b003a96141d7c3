"""Random numbers: each micro-batch has a stream of its own, which begins anew in each pass.

So dropout draws the same masks in both, although in the first pass micro-batches take turns, and in the second they
follow each other. The user's generators stand still meanwhile, but for the draw of the streams' seeds.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

_SEEDS = 2**63 - 1


class _Source(NamedTuple):
    """One generator that a forward may draw from."""

    get: Callable[[], Any]
    set: Callable[[Any], object]
    seed: Callable[[int], object]


class Streams:
    """The streams of a window's micro-batches: torch's on every device, Python's, NumPy's, modules' own."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self._sources = [*_process_sources(), *_device_sources(model), *_module_sources(model)]
        # On the CPU, and drawn from what torch.manual_seed() sets.
        self._seeds = torch.randint(_SEEDS, (count,), device="cpu").tolist()
        self._outside: list[Any] = []
        self._states: dict[int, list[Any]] = {}
        self._running: int | None = None

    def enter(self) -> None:
        """Nothing: the first turn notes how the generators are."""

    def begin_turn(self, index: int) -> None:
        """A micro-batch goes on where it stopped, and another one has stopped."""
        if index == self._running:
            return
        if self._running is None:
            self._outside = self._get()
        else:
            self._states[self._running] = self._get()
        self._running = index
        if index in self._states:
            self._set(self._states[index])
        else:
            for source in self._sources:
                source.seed(self._seeds[index])

    def leave(self) -> None:
        """Give the generators back as they were. May be called twice."""
        if self._running is not None:
            self._set(self._outside)
        self._running = None
        self._states.clear()

    def _get(self) -> list[Any]:
        return [source.get() for source in self._sources]

    def _set(self, states: list[Any]) -> None:
        for source, state in zip(self._sources, states, strict=True):
            source.set(state)


class Asides:
    """Torch's generators, put aside while a micro-batch waits at a meeting inside of a checkpoint.

    Its second forward draws at one go what the first one draws with meetings in between. So it goes on where it
    stopped. Those that run meanwhile draw other numbers, and so do those who draw after the lockstep.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sources = list(_device_sources(model))
        self._seeds: random.Random | None = None
        self._seed_after = 0

    def enter(self) -> None:
        """Nothing, until one waits."""

    @contextmanager
    def while_waiting(self) -> Iterator[None]:
        """New streams; in the end, those that were here go on."""
        states = [source.get() for source in self._sources]
        if self._seeds is None:
            # From what torch.manual_seed() sets, and no draw from it:
            # the second forward would not repeat that.
            self._seeds = random.Random(bytes(torch.default_generator.get_state().tolist()))
            self._seed_after = self._seeds.getrandbits(63)
        self._seed(self._seeds.getrandbits(63))
        yield
        for source, state in zip(self._sources, states, strict=True):
            source.set(state)

    def leave(self) -> None:
        """Begin streams that depend on how the first one was alone, and not on who came how far. May be called twice.

        Ranks with unequal numbers of micro-batches stay in step, if nothing was drawn.
        """
        if self._seeds is not None:
            self._seed(self._seed_after)

    def _seed(self, seed: int) -> None:
        for source in self._sources:
            source.seed(seed)


def _process_sources() -> Iterator[_Source]:
    yield _Source(random.getstate, random.setstate, random.seed)
    if (numpy := sys.modules.get("numpy")) is not None:  # else nothing draws from it
        yield _of_numpy(numpy.random)


def _device_sources(model: nn.Module) -> Iterator[_Source]:
    yield _of_generator(torch.default_generator)
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    for device in sorted(devices, key=str):
        if device.type == "cuda":
            yield _of_generator(torch.cuda.default_generators[device.index])
        elif device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            yield _Source(module.get_rng_state, module.set_rng_state, module.manual_seed)


def _module_sources(model: nn.Module) -> Iterator[_Source]:
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Generator):
                yield _of_generator(value)
            elif isinstance(value, random.Random):
                yield _Source(value.getstate, value.setstate, value.seed)


def _of_generator(generator: torch.Generator) -> _Source:
    return _Source(generator.get_state, generator.set_state, generator.manual_seed)


def _of_numpy(module: Any) -> _Source:
    """NumPy's own generator. To copy its state takes 60 us, so another generator is put in its place."""
    if not hasattr(module, "get_bit_generator"):  # before NumPy 1.24
        return _Source(module.get_state, module.set_state, lambda seed: module.seed(seed % 2**32))
    place = module.set_bit_generator
    return _Source(module.get_bit_generator, place, lambda seed: place(module.MT19937(seed)))
