"""What a rank does on request: join a group, go forward, commit, and say where it is and what came of it."""

from __future__ import annotations

import datetime
import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncaccum import CommitError, SyncAccumBatchNorm, commit, convert_sync_accum, discard

# 4,096 channels in all: the ranks' messages of 64 KiB are too long for one frame, or for one answer of TCP's.
_WIDTH = 2048
_MICRO_BATCHES = 2
_MICRO_BATCH = 3

IN_FORWARD = "in forward"
IN_COMMIT = "in commit"


@dataclass(frozen=True)
class Outcome:
    """What a commit came to. Times are CLOCK_MONOTONIC's, which all processes of a machine share."""

    began: float
    ended: float
    error: str = ""
    message: str = ""
    values: int = 0
    """Per channel of the last layer in the global batch, where the commit went through."""
    unchanged: bool = False
    """Statistics and windows are the bytes that they were before the commit."""


class Job:
    """The model of one rank, and its methods by name for the process that asks; ``tell`` sends that process a word."""

    def __init__(self, node: int, tell: Callable[[str], None]) -> None:
        self._node = node
        self._tell = tell
        self._model = self._build_model()

    def _build_model(self) -> nn.Module:
        self._pause = _Pause(lambda: self._tell(IN_FORWARD))
        layers = nn.Sequential(nn.BatchNorm1d(_WIDTH), self._pause, nn.BatchNorm1d(_WIDTH))
        # A replacement has committed statistics alone: "window" would
        # give the second layer other inputs than the lost rank's.
        return convert_sync_accum(layers, normalization="renorm")

    def start_over(self) -> None:
        """An untrained model."""
        self._model = self._build_model()

    def join(self, rendezvous: str, rank: int, size: int, timeout: float) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )

    def leave(self) -> None:
        if dist.is_initialized():
            gc.collect()  # a traceback in a cycle may hold the group
            dist.destroy_process_group()

    def forward(self, step: int, pause: float = 0.0, poison: bool = False) -> None:
        """The micro-batches of this step, which are this node's own; the last takes ``pause`` seconds longer."""
        generator = torch.Generator().manual_seed(1000 * step + self._node)
        self._model.train()
        with torch.no_grad():
            for index in range(_MICRO_BATCHES):
                x = 3 * torch.randn(_MICRO_BATCH + self._node, _WIDTH, generator=generator) + self._node
                if index == _MICRO_BATCHES - 1:
                    self._pause.seconds = pause
                    if poison:
                        x[0, 0] = torch.nan
                self._model(x)
        self._pause.seconds = 0.0

    def commit(self, timeout: float | None = None) -> Outcome:
        before = self.state()
        self._tell(IN_COMMIT)
        began = time.monotonic()
        try:
            report = commit(self._model, timeout=timeout)
        except CommitError as error:
            ended = time.monotonic()
            traceback.clear_frames(error.__traceback__)
            unchanged = same_bytes(self.state(), before)
            return Outcome(began, ended, type(error).__name__, str(error), unchanged=unchanged)
        return Outcome(began, time.monotonic(), values=list(report.values.values())[-1])

    def step(self, step: int, pause: float = 0.0, timeout: float | None = None) -> Outcome:
        self.forward(step, pause)
        return self.commit(timeout)

    def commit_another(self) -> Outcome:
        """Commit a model of other layers instead of ours."""
        ours = self._model
        self._model = convert_sync_accum(nn.Sequential(nn.BatchNorm1d(5)))
        try:
            return self.commit()
        finally:
            self._model = ours

    def replace_layer(self, width: int) -> None:
        """A second layer of another width, which the first micro-batch to come would not fit."""
        self._model[2] = SyncAccumBatchNorm(width)

    def state(self) -> dict[str, Tensor]:
        """Statistics, counters and open windows."""
        state = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        for name, layer in self._model.named_modules():
            if isinstance(layer, SyncAccumBatchNorm):
                state[f"{name}.window"] = layer.window.pack()
        return state

    def statistics(self) -> dict[str, Tensor]:
        return dict(self._model.state_dict())

    def take_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Those of a peer. The open window stays."""
        self._model.load_state_dict(statistics)

    def discard(self) -> None:
        discard(self._model)


class _Pause(nn.Module):
    """Between the two layers: the first has accumulated the micro-batch, the second has not."""

    def __init__(self, on_pause: Callable[[], None]) -> None:
        super().__init__()
        self.seconds = 0.0
        self._on_pause = on_pause

    def forward(self, x: Tensor) -> Tensor:
        if self.seconds:
            self._on_pause()
            time.sleep(self.seconds)
        return x


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, so that NaN equals itself."""
    return a.keys() == b.keys() and all(_to_bytes(a[name]) == _to_bytes(b[name]) for name in a)


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
