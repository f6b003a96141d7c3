"""lockstep over two ranks on a network of transformers, under DDP, against one process on the whole batch."""

from __future__ import annotations

import gc

import torch
from torch.nn.parallel import DistributedDataParallel

from syncaccum import commit, lockstep
from tests.networks import NETWORKS, assert_same_buffers, assert_same_gradients, loss_of
from tests.ranks import Rank, on_ranks

# Examples of each micro-batch, by rank: unequal numbers of them, of unequal sizes, one of them empty.
SIZES = [[2, 0, 1], [3, 1]]


@on_ranks(2, timeout=60)  # importing transformers takes longer on one rank than on the other
def test_a_resnet_of_transformers_on_two_ranks(rank: Rank) -> None:
    network = NETWORKS["ResNet"]
    model, reference = network.pair()
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        whole = network.examples(sum(map(sum, SIZES)))
        mine = whole.split([sum(sizes) for sizes in SIZES])[rank.index].split(SIZES[rank.index])
        model.zero_grad()
        reference.zero_grad()
        torch.autograd.backward(torch.stack(lockstep(ddp, lambda x: loss_of(ddp(x)), mine)).sum())
        commit(ddp)
        loss_of(reference(whole)).backward()
        # DDP averages over the ranks; the reference sums.
        assert_same_gradients(network, model, reference, scale=1 / rank.size)
        assert_same_buffers(model, reference)
    gc.collect()  # DDP's reference cycles keep gloo busy after the group is gone
