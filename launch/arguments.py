"""The options of train.py, and what makes their values invalid; imports no torch, so errors come fast."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.placement import Placement
from launch.schedule import TRAIN_IMAGES, smallest_micro_batch

NORMALIZATIONS = ("window", "renorm", "batch", "running", "none")
MODELS = ("resnet", "mlp")
DTYPES = ("float32", "float64")
RESUMES = ("no", "yes", "auto")
TRANSPORTS = ("torch", "mpi")

MISSING_PACKAGE_REMEDY = "pip install 'syncaccum[demo]' brings what train.py needs"

# Options that may differ between a run and its continuation: they do not change what a step computes.
_FREE_ON_RESUME = (
    "transport",
    "timeout",
    "epochs",
    "output",
    "resume",
    "overwrite",
    "checkpoint_every",
    "keep_checkpoints",
)


@dataclass(frozen=True)
class Arguments:
    """What train.py was asked to do; one field per option."""

    micro_batch: int = 4
    window: int = 64
    normalization: str = "window"
    model: str = "resnet"
    lr: float = 0.1
    momentum: float = 0.9
    epochs: int = 6
    seed: int = 0
    dtype: str = "float32"
    transport: str = "torch"
    timeout: float = 1800.0
    train_images: int = TRAIN_IMAGES
    output: str = "runs/demo"
    resume: str = "no"
    overwrite: bool = False
    checkpoint_every: int = 0
    keep_checkpoints: int = 3

    def contradictions(self, saved: dict[str, Any]) -> list[str]:
        """Options whose values differ from a checkpoint's and would change what its run computes."""
        return [
            f"--{name.replace('_', '-')} is {value}, the checkpoint's is {saved.get(name)}"
            for name, value in dataclasses.asdict(self).items()
            if name not in _FREE_ON_RESUME and saved.get(name) != value
        ]


class InvalidArgumentError(ValueError):
    """An option's value that cannot work; the message names option, value and remedy."""


def parse_arguments(argv: Sequence[str] | None, placement: Placement) -> Arguments:
    """Parse and check the command line; ends the process with status 2 on a bad one."""
    parser = _build_parser(placement)
    arguments = Arguments(**vars(parser.parse_args(argv)))
    try:
        if arguments.transport == "mpi" and not placement.mpi:
            raise _invalid(arguments, "transport", "no MPI started this process; use launch/mpirun.sh, or torch")
        check_arguments(arguments, placement.size)
    except InvalidArgumentError as error:
        parser.error(str(error))
    return arguments


def check_arguments(arguments: Arguments, ranks: int) -> None:
    """Raise InvalidArgumentError for values that cannot work with so many ranks."""
    _check_ranges(arguments)
    _check_output(arguments)
    _check_window(arguments, ranks)
    _check_values_per_channel(arguments, ranks)


def _check_ranges(arguments: Arguments) -> None:
    for name in ("micro_batch", "window", "epochs", "train_images", "keep_checkpoints"):
        if getattr(arguments, name) < 1:
            raise _invalid(arguments, name, "give 1 or more")
    if arguments.train_images > TRAIN_IMAGES:
        raise _invalid(arguments, "train_images", f"there are {TRAIN_IMAGES} training images; give that at most")
    if arguments.checkpoint_every < 0:
        raise _invalid(arguments, "checkpoint_every", "give 0 for the end of each epoch, or a number of steps")
    # Written so that NaN fails.
    if not 0 < arguments.lr < float("inf"):
        raise _invalid(arguments, "lr", "give a finite number above 0")
    if not 0 < arguments.timeout < float("inf"):
        raise _invalid(arguments, "timeout", "give a finite number of seconds above 0")
    if not 0 <= arguments.momentum < 1:
        raise _invalid(arguments, "momentum", "give a number in [0, 1)")


def _check_output(arguments: Arguments) -> None:
    output = Path(arguments.output)
    # os.path: Path.exists raises where a name is too long, and rank 0 tells that soon.
    if any(os.path.exists(path) and not os.path.isdir(path) for path in (output, *output.parents)):
        raise _invalid(arguments, "output", "that is, or is below, a file; give a folder")
    if arguments.overwrite and arguments.resume != "no":
        raise _invalid(arguments, "resume", "--overwrite removes what it would go on from; give one of them")


def _check_window(arguments: Arguments, ranks: int) -> None:
    if arguments.window < ranks:
        raise _invalid(
            arguments,
            "window",
            f"{ranks} ranks cannot share so few images; give {ranks} or more, or start fewer ranks",
        )


def _check_values_per_channel(arguments: Arguments, ranks: int) -> None:
    """The mlp's layers see one value per image: some sets of images are too small for a variance."""
    if arguments.model != "mlp":
        return
    if 1 in (arguments.window, arguments.train_images % arguments.window):
        raise _invalid(
            arguments,
            "window",
            f"some global batch of the {arguments.train_images} training images would be a single one, which "
            "has no variance under --model mlp; give a window that leaves no remainder of 1",
        )
    smallest = smallest_micro_batch(arguments.train_images, arguments.window, arguments.micro_batch, ranks)
    if smallest == 1 and arguments.normalization in ("batch", "none"):
        raise _invalid(
            arguments,
            "micro_batch",
            f"with --window {arguments.window} and {ranks} rank(s) some micro-batch would be a single image, "
            f"which --normalization {arguments.normalization} cannot normalise in --model mlp; give another "
            "micro-batch, or --normalization window",
        )


def _invalid(arguments: Arguments, name: str, remedy: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: {remedy}")


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line once per machine, not once per rank."""

    placement = Placement()

    def error(self, message: str) -> Any:
        self.placement.stop(f"{self.format_usage()}{self.prog}: error: {message}", 2)


def _build_parser(placement: Placement) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Train a small network on scikit-learn's 8x8 digits with gradient accumulation over "
        "micro-batches and ranks, and BatchNorm statistics of the global batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.placement = placement
    add, default = parser.add_argument, Arguments()
    add("--micro-batch", type=int, default=default.micro_batch, help="images per forward, at most")
    add("--window", type=int, default=default.window, help="images per optimizer step, over all ranks")
    add(
        "--normalization",
        choices=NORMALIZATIONS,
        default=default.normalization,
        help="policy of convert_sync_accum; none is plain nn.BatchNorm on each micro-batch",
    )
    add("--model", choices=MODELS, default=default.model, help="resnet: 17 BatchNorm2d; mlp: 3 BatchNorm1d")
    add("--lr", type=float, default=default.lr, help="learning rate of SGD")
    add("--momentum", type=float, default=default.momentum, help="momentum of SGD")
    add("--epochs", type=int, default=default.epochs, help="passes over the training images")
    add("--seed", type=int, default=default.seed, help="of initial weights and of the order of the data")
    add("--dtype", choices=DTYPES, default=default.dtype, help="of parameters and activations")
    add(
        "--transport",
        choices=TRANSPORTS,
        default=default.transport,
        help="what commits are reduced with: torch's process group, or MPI under mpirun",
    )
    add(
        "--timeout",
        type=float,
        default=default.timeout,
        help="seconds that ranks wait for a peer that is stuck or cut off; a dead one is noticed at once",
    )
    add("--train-images", type=int, default=default.train_images, help="train on the first so many images")
    add("--output", default=default.output, help="folder for checkpoint, TensorBoard, metrics and plot")
    add(
        "--resume",
        nargs="?",
        choices=RESUMES,
        const="yes",
        default=default.resume,
        help="go on from the newest whole checkpoint in the output folder; auto: start where there is none, as a "
        "launcher that restarts the job needs it",
    )
    add("--overwrite", action="store_true", help="start anew where the output folder has checkpoints, and remove them")
    add(
        "--checkpoint-every",
        type=int,
        default=default.checkpoint_every,
        help="optimizer steps between checkpoints; 0: at the end of each epoch, which always gets one",
    )
    add("--keep-checkpoints", type=int, default=default.keep_checkpoints, help="how many, the newest ones")
    return parser
