"""The experiment's relatives from the literature, beside slow and plain transcriptions of their papers' formulas."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from benchmarks.equivalence.peers import MovingAverageNorm, OnlineNorm

CHANNELS = 3
Gradients = tuple[list[Tensor], list[Tensor]]


def make_layer(seed: int) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5)
        layer.bias.copy_(torch.randn(CHANNELS, generator=generator, dtype=torch.float64))
    return layer


def make_micro_batches(sizes: Sequence[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs, off centre, and gradients of the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Tensor:
        return torch.randn(size, CHANNELS, 2, 3, generator=generator, dtype=torch.float64)

    return [(2 * draw(size) + 1, draw(size)) for size in sizes]


def walk(layer: nn.Module, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> Gradients:
    """Outputs and gradients of inputs, one micro-batch after the other."""
    outputs, gradients = [], []
    for x, dy in micro_batches:
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(dy)
        outputs.append(y.detach())
        gradients.append(x.grad)
    return outputs, gradients


def stream_plainly(
    layer: nn.BatchNorm2d, samples: Sequence[tuple[Tensor, Tensor]], a_f: float, a_b: float
) -> Gradients:
    """Online Normalization, number by number: equations 8 to 10 of arXiv 1905.05894 and its layer scaling."""
    mean, variance = [0.0] * CHANNELS, [1.0] * CHANNELS
    error_y, error_1 = [0.0] * CHANNELS, [0.0] * CHANNELS
    outputs, gradients = [], []
    for x, dy in samples:
        before_mean, sigma = list(mean), [(v + layer.eps) ** 0.5 for v in variance]
        y = torch.stack([(x[c] - before_mean[c]) / sigma[c] for c in range(CHANNELS)])
        for c in range(CHANNELS):
            own, spread = x[c].mean().item(), x[c].var(correction=0).item()
            variance[c] = a_f * variance[c] + (1 - a_f) * spread + a_f * (1 - a_f) * (own - mean[c]) ** 2
            mean[c] = a_f * mean[c] + (1 - a_f) * own
        # Affine and layer scaling are ordinary functions: autograd has their derivative.
        leaf = y.clone().requires_grad_()
        moved = torch.stack([leaf[c] * layer.weight[c] + layer.bias[c] for c in range(CHANNELS)])
        z = moved / (moved.square().mean() + layer.eps).sqrt()
        (upstream,) = torch.autograd.grad(z, leaf, dy)
        dx = torch.empty_like(x)
        for c in range(CHANNELS):
            controlled = upstream[c] - (1 - a_b) * error_y[c] * y[c]
            error_y[c] += (controlled * y[c]).mean().item()
            dx[c] = controlled / sigma[c] - (1 - a_b) * error_1[c]
            error_1[c] += dx[c].mean().item()
        outputs.append(z.detach())
        gradients.append(dx)
    return outputs, gradients


def average_plainly(layer: nn.BatchNorm2d, micro_batches: Sequence[tuple[Tensor, Tensor]], last: int) -> Gradients:
    """MABN's averages over the ``last`` micro-batches, number by number, in BatchNorm's own form: arXiv 2001.06838."""
    outputs, gradients = [], []
    statistics: list[list[tuple[float, float]]] = [[] for _ in range(CHANNELS)]
    feedback: list[list[tuple[float, float]]] = [[] for _ in range(CHANNELS)]
    for x, dz in micro_batches:
        y, dx = torch.empty_like(x), torch.empty_like(x)
        for c in range(CHANNELS):
            statistics[c].append((x[:, c].mean().item(), x[:, c].square().mean().item()))
            mean, square = (sum(v[i] for v in statistics[c][-last:]) / len(statistics[c][-last:]) for i in (0, 1))
            sigma = (square - mean**2 + layer.eps) ** 0.5
            x_hat = (x[:, c] - mean) / sigma
            y[:, c] = layer.weight[c].item() * x_hat + layer.bias[c].item()
            dy = dz[:, c] * layer.weight[c].item()
            feedback[c].append((dy.mean().item(), (dy * x_hat).mean().item()))
            psi, psi_x = (sum(v[i] for v in feedback[c][-last:]) / len(feedback[c][-last:]) for i in (0, 1))
            dx[:, c] = (dy - psi - x_hat * psi_x) / sigma
        outputs.append(y)
        gradients.append(dx)
    return outputs, gradients


@pytest.mark.parametrize("sizes", [(1,) * 6, (4, 1, 3)])
def test_online_normalization_is_what_its_paper_says(sizes: tuple[int, ...]) -> None:
    batches = make_micro_batches(sizes, seed=1)
    samples = [(x[i], dy[i]) for x, dy in batches for i in range(len(x))]
    expected = stream_plainly(make_layer(0), samples, 0.9, 0.8)
    for mine, plain in zip(walk(OnlineNorm(make_layer(0), 0.9, 0.8), batches), expected, strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.stack(plain))


def test_online_normalization_does_not_depend_on_the_micro_batch() -> None:
    whole = make_micro_batches((8,), seed=2)
    halves = [(x[part], dy[part]) for x, dy in whole for part in (slice(0, 4), slice(4, 8))]
    for mine, other in zip(
        walk(OnlineNorm(make_layer(0)), whole), walk(OnlineNorm(make_layer(0)), halves), strict=True
    ):
        torch.testing.assert_close(torch.cat(mine), torch.cat(other))


@pytest.mark.parametrize("sizes", [(1,) * 7, (2,) * 7])
def test_moving_averages_are_what_their_paper_says(sizes: tuple[int, ...]) -> None:
    batches = make_micro_batches(sizes, seed=3)
    expected = average_plainly(make_layer(0), batches, last=3)
    for mine, plain in zip(walk(MovingAverageNorm(make_layer(0), 3), batches), expected, strict=True):
        torch.testing.assert_close(torch.cat(mine), torch.cat(plain))


def test_moving_averages_over_one_micro_batch_are_batchnorm() -> None:
    batches = make_micro_batches((4, 4), seed=4)
    for mine, plain in zip(
        walk(MovingAverageNorm(make_layer(0), 1), batches), walk(make_layer(0), batches), strict=True
    ):
        torch.testing.assert_close(torch.cat(mine), torch.cat(plain))


@pytest.mark.parametrize("make", [OnlineNorm, lambda layer: MovingAverageNorm(layer, 2)])
def test_a_test_forward_keeps_no_statistics(make: type[OnlineNorm]) -> None:
    layer = make(make_layer(0))
    ((x, _),) = make_micro_batches((4,), seed=5)
    layer(x)
    mean, variance = layer.mean.clone(), layer.variance.clone()
    layer.eval()
    # The second half alone gives what it gives beside the first.
    torch.testing.assert_close(layer(x)[2:], layer(x[2:]))
    torch.testing.assert_close((layer.mean, layer.variance), (mean, variance), rtol=0, atol=0)


def test_a_perceptrons_inputs_have_no_positions() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(4, CHANNELS, generator=generator, dtype=torch.float64)
    for layer in (OnlineNorm(make_layer(0)), MovingAverageNorm(make_layer(0), 2)):
        assert layer(x).shape == x.shape
