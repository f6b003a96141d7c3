"""How far are lockstep's gradients from the large batch's, with a checkpoint around each block and dropout inside?

In float64. The large batch takes the masks that the micro-batches have drawn.

    python -m benchmarks.checkpoint_gradients
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.report import Figure, publish
from syncaccum import lockstep
from tests.distributed.test_lockstep import SPLITS
from tests.distributed.test_lockstep_checkpoint import gather_masks
from tests.ranks import Rank, run_on_ranks
from tests.unit.test_lockstep import images
from tests.unit.test_lockstep_checkpoint import blocks, hand_masks, loss_of

SEEDS = 20


def measure(rank: Rank) -> float:
    """The largest distance of any seed's gradient, over the large batch's length."""
    return max(compare(rank, seed) for seed in range(SEEDS))


def compare(rank: Rank, seed: int) -> float:
    torch.manual_seed(seed)
    model, reference = blocks()
    sizes = SPLITS[rank.size]
    whole = torch.cat(images(sum(map(sum, sizes))))
    mine = torch.split(torch.split(whole, [sum(s) for s in sizes])[rank.index], sizes[rank.index])
    torch.manual_seed(1000 * seed + rank.index)  # masks of their own
    outputs = lockstep(model, model, mine)
    gather_masks(model)
    hand_masks(model, reference, as_one=True)
    torch.autograd.backward([loss_of(y) for y in outputs])
    torch.autograd.backward(loss_of(reference(whole)))
    gradient, expected = gradient_of(model), gradient_of(reference)
    dist.all_reduce(gradient)
    return float((gradient - expected).norm() / expected.norm())


def gradient_of(model: nn.Module) -> Tensor:
    return parameters_to_vector([p.grad for p in model.parameters() if p.grad is not None])


def main() -> None:
    errors = {ranks: max(run_on_ranks(measure, ranks)) for ranks in (1, 2)}
    figures = [
        Figure(f"gradient's relative error, float64, ranks: {ranks}", error, 1e-12, note=f"largest of {SEEDS} seeds")
        for ranks, error in errors.items()
    ]
    publish("checkpoint_gradients", figures)


if __name__ == "__main__":
    main()
