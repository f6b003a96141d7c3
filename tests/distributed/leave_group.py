"""A program of one gloo rank that uses DDP, destroys its process group, and says which threads it still has."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from syncaccum import commit, convert_sync_accum

torch.manual_seed(0)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = convert_sync_accum(torch.nn.BatchNorm1d(3))
ddp = DistributedDataParallel(model)
ddp(torch.randn(4, 3)).sum().backward()
commit(model)
del ddp
gc.collect()
dist.destroy_process_group()
print(*((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()))
