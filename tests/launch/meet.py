"""What the nodes of a test run: each rank says who it is and what the ranks sum to."""

from __future__ import annotations

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank()])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: the ranks sum to {total.item()}")
dist.destroy_process_group()
