"""lockstep across nodes trains as one process does on the whole batch."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncaccum import commit_on_step, lockstep
from tests.distributed.test_lockstep import images, models
from tests.ranks import Rank

STEPS = 3
# Images of each micro-batch of ranks 0, 1 and 2, and again of the next three: unequal numbers, of unequal sizes.
SIZES = ((2,), (3, 1), (2, 0, 4))


def list_sizes(ranks: int) -> list[tuple[int, ...]]:
    return [SIZES[index % len(SIZES)] for index in range(ranks)]


def split_unevenly(whole: Tensor, rank: Rank) -> list[Tensor]:
    """This rank's micro-batches of the global batch."""
    sizes = list_sizes(rank.size)
    start = sum(map(sum, sizes[: rank.index]))
    return list(whole[start : start + sum(sizes[rank.index])].split(sizes[rank.index]))


def test_training_on_uneven_micro_batches_equals_the_large_batch(rank: Rank) -> None:
    model, reference = models()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    commit_on_step(ddp, optimizer)
    expected = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    window = sum(map(sum, list_sizes(rank.size)))
    for step in range(STEPS):
        whole, classes = images(step, window), torch.arange(window) % 10

        def forward(batch: tuple[Tensor, Tensor]) -> Tensor:
            # DDP averages over the ranks; the reference takes the mean over the images.
            return nn.functional.cross_entropy(ddp(batch[0]), batch[1], reduction="sum") * (rank.size / window)

        optimizer.zero_grad()
        batches = list(zip(split_unevenly(whole, rank), split_unevenly(classes, rank), strict=True))
        torch.autograd.backward(torch.stack(lockstep(ddp, forward, batches)).sum())
        optimizer.step()
        expected.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(reference(whole), classes))
        expected.step()
    for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        # The target for one step of a ResNet is 1e-12 of the gradient; three steps at this rate hardly add to it.
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=f"{name}: {{}}".format)
    gc.collect()  # DDP's reference cycles keep gloo busy after the group is gone
