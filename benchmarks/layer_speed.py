"""How long does a training forward and backward of the layer take, next to nn.BatchNorm2d and the seed's layer?

All layers take turns in one process, a block of calls each; a ratio is the median over rounds of the ratio within a
round, so that a machine whose speed drifts does not tilt it. The seed's layer has rounds of its own: what it leaves of
caches and heap would slow down whatever comes next. Targets are for the median of the three shapes, with the compiled
passes; SYNCACCUM_NATIVE=0 measures torch's own, and publishes them beside.

    python -m benchmarks.layer_speed
"""

from __future__ import annotations

import statistics
import time
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.report import Figure, publish
from syncaccum import SyncAccumBatchNorm, commit
from syncaccum.layer import native

ROUNDS = 15
BLOCK = 15
SHAPES = [(8, 64, 56, 56), (8, 256, 28, 28), (4, 512, 14, 14)]
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
POLICIES = ("running", "renorm", "batch", "window")
IS_COMPILED = native.which().startswith("compiled")
TARGETS: dict[tuple[str, str], float] = {
    ("running", "NCHW"): 0.45,
    ("running", "channels_last"): 0.8,
    ("renorm", "NCHW"): 0.7,
    ("renorm", "channels_last"): 0.9,
    ("batch", "NCHW"): 0.7,
    ("batch", "channels_last"): 0.9,
    ("window", "NCHW"): 0.7,
    ("window", "channels_last"): 0.9,
}
if not IS_COMPILED:
    TARGETS = {("renorm", "channels_last"): 1.15}


class SeedLayer(nn.BatchNorm2d):
    """What the forum's layer does, in the plain tensor operations it does it with.

    Sums and sums of squares in the input's precision that keep their autograd graph; the input normalised with
    the running statistics and multiplied by weight and bias (it needs affine=True) step by step.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.reset()

    def reset(self) -> None:
        self.total: Tensor | float = 0.0
        self.total_sq: Tensor | float = 0.0
        self.samples = 0

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total + x.mean((2, 3)).sum(0)
        self.total_sq = self.total_sq + (x * x).mean((2, 3)).sum(0)
        self.samples += x.shape[0]
        mean, variance, weight, bias = (
            cast(Tensor, v).view(1, -1, 1, 1) for v in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) / (variance + self.eps).sqrt() * weight + bias


class BarePasses(nn.Module):
    """The floor of policy running: torch's kernels for the four passes on ready-made vectors, and nothing else.

    No autograd, no window, no arithmetic per channel. Its "forward" does the forward's passes, `backward` the others.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.vectors = [torch.zeros(channels), torch.ones(channels)]

    def forward(self, x: Tensor) -> Tensor:
        zeros, ones = self.vectors
        if x.is_contiguous():
            rows = x.flatten(2)
            torch.linalg.vector_norm(rows, dim=2)
            rows.sum(2)
            return torch.native_batch_norm(x, ones, zeros, zeros, ones, False, 0.0, 0.0)[0]
        torch.batch_norm_update_stats(x, None, None, 0.0)
        return torch.addcmul(zeros.view(1, -1, 1, 1), x, ones.view(1, -1, 1, 1))

    def backward(self, x: Tensor, dy: Tensor) -> Tensor:
        zeros, ones = self.vectors
        mask = [False, True, True]
        torch.ops.aten.native_batch_norm_backward(dy, x, None, None, None, zeros, ones, True, 0.0, mask)
        return dy * ones.view(1, -1, 1, 1)


def make_layers(channels: int, x: Tensor) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {
        "nn.BatchNorm2d": nn.BatchNorm2d(channels),
        "seed": SeedLayer(channels),
        "bare passes": BarePasses(channels),
    }
    for policy in POLICIES:
        layers[policy] = SyncAccumBatchNorm(channels, normalization=policy)
        y = layers[policy](x)
        torch.autograd.grad(y, x, torch.ones_like(y))
        commit(layers[policy])  # past the first window, of which less is known
    return layers


def time_block(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Seconds of one forward and backward: the median over a block, past its first call."""
    times = []
    for _ in range(BLOCK):
        start = time.perf_counter()
        if isinstance(layer, BarePasses):
            with torch.no_grad():
                result: tuple[object, ...] = (layer(x), layer.backward(x, dy))
        else:
            y = layer(x)
            result = y, torch.autograd.grad(y, (x, *layer.parameters()), dy)
        times.append(time.perf_counter() - start)
        del result
    if isinstance(layer, SeedLayer):
        layer.reset()
    elif isinstance(layer, SyncAccumBatchNorm):
        layer.discard()
    return statistics.median(times[1:])


def measure(shape: tuple[int, ...], memory_format: torch.memory_format) -> dict[str, dict[str, list[float]]]:
    """Seconds by peer, then by layer, a value for each round."""
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    dy = torch.randn(shape).to(memory_format=memory_format)
    layers = make_layers(shape[1], x)
    turns = {
        "nn.BatchNorm2d": ("nn.BatchNorm2d", *POLICIES, "bare passes"),
        "seed": ("seed", "running"),
    }
    times: dict[str, dict[str, list[float]]] = {peer: {name: [] for name in names} for peer, names in turns.items()}
    for peer, names in turns.items():
        for _ in range(ROUNDS):
            for name in names:
                times[peer][name].append(time_block(layers[name], x, dy))
    return times


def median_ratio(times: dict[str, dict[str, list[float]]], name: str, peer: str) -> float:
    return statistics.median(a / b for a, b in zip(times[peer][name], times[peer][peer], strict=True))


def main() -> None:
    # One large tensor, freed: glibc then keeps freed memory as it does in any real network. Without it, two tensors
    # of 6.4 MB sit just above its limit, and every round returns them to the system and faults them in again,
    # which adds the same 1.6 ms to all layers.
    torch.ones(7_500_000)
    print(f"CPU passes: {native.which()}")
    figures, summaries, details = [], [], {}
    for order, memory_format in FORMATS.items():
        ratios: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for shape in SHAPES:
            times = measure(shape, memory_format)
            where = f"{'x'.join(map(str, shape))} {order}"
            medians = {
                name: statistics.median(s) * 1e3 for name, s in (times["seed"] | times["nn.BatchNorm2d"]).items()
            }
            details[where] = {name: f"{ms:.3f} ms" for name, ms in medians.items()}
            for policy in POLICIES:
                ratios[policy].append(median_ratio(times, policy, "nn.BatchNorm2d"))
                figures.append(
                    Figure(f"{policy} / nn.BatchNorm2d, {where}", ratios[policy][-1], note=details[where][policy])
                )
            floor = median_ratio(times, "bare passes", "nn.BatchNorm2d")
            figures.append(
                Figure(f"torch's own passes / nn.BatchNorm2d, {where}", floor, note=details[where]["bare passes"])
            )
            figures.append(Figure(f"running / seed, {where}", median_ratio(times, "running", "seed"), 0.5))
        for policy in POLICIES:
            what = f"{policy} / nn.BatchNorm2d, median of shapes, {order}"
            target = TARGETS.get((policy, order))
            summaries.append(Figure(what, statistics.median(ratios[policy]), target))
    publish("layer_speed" if IS_COMPILED else "layer_speed_torch", [*summaries, *figures], details)


if __name__ == "__main__":
    main()
