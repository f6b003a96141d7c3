"""Train with gradient accumulation and BatchNorm statistics of the global batch, started by mpirun or srun.

    mpirun -n 2 python -m mpi4py mpi.py

Needs `pip install syncaccum[mpi]` and an MPI library. A checkpoint would be written as in train.py.
"""

import argparse
import gc
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch import nn

import syncaccum
from syncaccum.integrations.mpi import init_process_group

GLOBAL_BATCH, MICRO_BATCH, TEST_IMAGES = 64, 4, 360


def main(epochs: int) -> None:
    here = init_process_group(backend="gloo")  # for GPUs: "nccl", and the device here.local_rank

    torch.manual_seed(0)
    digits = load_digits()
    shuffled = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images[:, None], dtype=torch.float32)[shuffled] / 8 - 1
    classes = torch.tensor(digits.target)[shuffled]

    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    # Statistics go over MPI, gradients over torch.distributed. Without a process_group both go over the latter.
    syncaccum.convert_sync_accum(model, process_group=MPI.COMM_WORLD.Dup())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    syncaccum.commit_on_step(model, optimizer)
    parallel = nn.parallel.DistributedDataParallel(model)

    for epoch in range(epochs):
        order = torch.randperm(len(images) - TEST_IMAGES, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(GLOBAL_BATCH):
            parts = batch.tensor_split(here.size)[here.rank].split(MICRO_BATCH)
            for part in parts:
                # DDP need not average gradients before the last micro-batch.
                with nullcontext() if part is parts[-1] else parallel.no_sync():
                    loss = F.cross_entropy(parallel(images[part]), classes[part], reduction="sum")
                    (loss * here.size / len(batch)).backward()
            optimizer.step()  # commits the BatchNorm statistics, too
            optimizer.zero_grad()
        if here.rank == 0:
            print(f"epoch {epoch + 1} of {epochs}", flush=True)

    model.eval()
    if here.rank == 0:
        correct = model(images[-TEST_IMAGES:]).argmax(1) == classes[-TEST_IMAGES:]
        print(f"test accuracy {correct.double().mean():.1%} on {here.size} rank(s)")
    del parallel  # in reference cycles, which keep gloo's threads running while Python exits
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
