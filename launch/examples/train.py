"""Train with gradient accumulation and BatchNorm statistics of the global batch, across micro-batches and ranks.

    python train.py
    torchrun --standalone --nproc-per-node 2 train.py

A small network on scikit-learn's digits. Started again, with more --epochs, it goes on from digits.pt.
"""

import argparse
import gc
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import syncaccum

GLOBAL_BATCH, MICRO_BATCH, TEST_IMAGES, CHECKPOINT = 64, 4, 360, "digits.pt"


def main(epochs: int) -> None:
    launched = "RANK" in os.environ  # by torchrun
    if launched:
        dist.init_process_group("gloo")  # for GPUs: "nccl", and a device for each rank
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    torch.manual_seed(0)
    digits = load_digits()
    shuffled = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images[:, None], dtype=torch.float32)[shuffled] / 8 - 1
    classes = torch.tensor(digits.target)[shuffled]
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    syncaccum.convert_sync_accum(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    syncaccum.commit_on_step(model, optimizer)
    done = 0
    if os.path.exists(CHECKPOINT):  # every rank reads it: put it where all machines see it
        saved = torch.load(CHECKPOINT, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        syncaccum.load_window_state_dict(model, saved["windows"])  # on more or fewer ranks, too
        done = saved["epochs"]
    parallel = nn.parallel.DistributedDataParallel(model) if launched else model

    for epoch in range(done, epochs):
        order = torch.randperm(len(images) - TEST_IMAGES, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(GLOBAL_BATCH):
            parts = batch.tensor_split(ranks)[rank].split(MICRO_BATCH)
            for part in parts:
                # DDP need not average gradients before the last micro-batch.
                with nullcontext() if part is parts[-1] or not launched else parallel.no_sync():
                    loss = F.cross_entropy(parallel(images[part]), classes[part], reduction="sum")
                    (loss * ranks / len(batch)).backward()
            optimizer.step()  # commits the BatchNorm statistics, too
            optimizer.zero_grad()
        windows = syncaccum.gather_window_state_dict(model)  # called by every rank; what the next window starts with
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "windows": windows}
            torch.save(state | {"epochs": epoch + 1}, CHECKPOINT + ".tmp")
            os.replace(CHECKPOINT + ".tmp", CHECKPOINT)  # a kill leaves the old one or the new one, whole
            print(f"epoch {epoch + 1} of {epochs}", flush=True)

    model.eval()
    if rank == 0:
        correct = model(images[-TEST_IMAGES:]).argmax(1) == classes[-TEST_IMAGES:]
        print(f"test accuracy {correct.double().mean():.1%}")
    if launched:
        del parallel  # in reference cycles, which keep gloo's threads running while Python exits
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
