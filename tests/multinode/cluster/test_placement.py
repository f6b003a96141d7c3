"""The ranks are where they were asked to be; the other tests would also pass on a single node."""

from __future__ import annotations

import os
import socket
from collections import Counter
from typing import Any

import torch.distributed as dist

from tests.ranks import Rank


def test_every_node_has_its_ranks(rank: Rank) -> None:
    by_rank: list[Any] = [None] * rank.size
    dist.all_gather_object(by_rank, socket.gethostname())
    nodes, ranks_per_node = int(os.environ["NNODES"]), int(os.environ["RANKS_PER_NODE"])
    assert Counter(by_rank) == {f"node{node}": ranks_per_node for node in range(nodes)}
