"""Train exactly as with the large batch: lockstep takes all micro-batches of a step through the model side by side.

    python exact.py
    torchrun --standalone --nproc-per-node 2 exact.py

Whatever --micro-batch and however many ranks, it trains the same network. In float32 rounding hides that soon;
--float64 shows it. A checkpoint would be written as in train.py.
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import syncaccum

GLOBAL_BATCH, TEST_IMAGES = 64, 360


def main(epochs: int, micro_batch: int, float64: bool) -> None:
    launched = "RANK" in os.environ  # by torchrun
    if launched:
        dist.init_process_group("gloo")  # for GPUs: "nccl", and a device for each rank
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    torch.set_default_dtype(torch.float64 if float64 else torch.float32)

    torch.manual_seed(0)
    digits = load_digits()
    shuffled = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images[:, None])[shuffled].to(torch.get_default_dtype()) / 8 - 1
    classes = torch.tensor(digits.target)[shuffled]

    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    syncaccum.convert_sync_accum(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    syncaccum.commit_on_step(model, optimizer)
    parallel = nn.parallel.DistributedDataParallel(model) if launched else model

    def forward(part: Tensor) -> Tensor:
        return F.cross_entropy(parallel(images[part]), classes[part], reduction="sum")

    for epoch in range(epochs):
        order = torch.randperm(len(images) - TEST_IMAGES, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(GLOBAL_BATCH):
            parts = batch.tensor_split(ranks)[rank].split(micro_batch)
            loss = torch.stack(syncaccum.lockstep(parallel, forward, parts)).sum()
            (loss * ranks / len(batch)).backward()  # DDP averages gradients over ranks
            optimizer.step()  # commits the BatchNorm statistics, too
            optimizer.zero_grad()
        if rank == 0:
            print(f"epoch {epoch + 1} of {epochs}", flush=True)

    model.eval()
    if rank == 0:
        logits = model(images[-TEST_IMAGES:])
        accuracy = (logits.argmax(1) == classes[-TEST_IMAGES:]).double().mean()
        loss = F.cross_entropy(logits, classes[-TEST_IMAGES:])
        print(f"test accuracy {accuracy:.1%}, test loss {loss.item():.15g}")
    if launched:
        del parallel, forward  # in reference cycles, which keep gloo's threads running while Python exits
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--float64", action="store_true")
    main(**vars(parser.parse_args()))
