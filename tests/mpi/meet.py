"""Every rank of a job started by MPI says where it is."""

import torch
import torch.distributed as dist

from syncaccum.integrations import mpi

here = mpi.init_process_group(backend="gloo", timeout=60)
total = torch.tensor(here.rank)
dist.all_reduce(total)
print(
    f"rank {here.rank} of {here.size}, local rank {here.local_rank} of {here.local_size}: the ranks sum to {total}",
    flush=True,
)
dist.destroy_process_group()
