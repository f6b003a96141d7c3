"""What a run shows and leaves behind: progress bar, TensorBoard, table, metrics.json and a plot."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from launch.arguments import Arguments
from launch.files import write_atomically
from launch.progress import EpochRecord, Progress, Sums


class Reporter(Protocol):
    """Told of every step and epoch; used as a context manager around them."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def on_step(self, progress: Progress, sums: Sums) -> None: ...

    def on_epoch(self, progress: Progress, record: EpochRecord) -> None: ...

    def on_checkpoint(self) -> None: ...

    def on_finish(self, progress: Progress, ranks: int, device: str) -> None: ...


class SilentReporter:
    """For every rank but rank 0."""

    def __enter__(self) -> SilentReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def on_step(self, progress: Progress, sums: Sums) -> None:
        return

    def on_epoch(self, progress: Progress, record: EpochRecord) -> None:
        return

    def on_checkpoint(self) -> None:
        return

    def on_finish(self, progress: Progress, ranks: int, device: str) -> None:
        return


@contextmanager
def _leave_errors_to_callers() -> Iterator[None]:
    """TensorBoard's thread hands its errors to whoever calls next; it shall not print them besides."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class ConsoleReporter:
    """For rank 0."""

    def __init__(self, arguments: Arguments, progress: Progress, steps_per_epoch: int) -> None:
        # Late: these imports take a second, which the other ranks do not have to spend. matplotlib is for the end of
        # the run, and should not be found missing only there.
        import matplotlib  # noqa: F401
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from torch.utils.tensorboard import SummaryWriter

        self._arguments = arguments
        self._folder = Path(arguments.output)
        self._console = Console()
        self._bars = Bars(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bars.add_task(
            "train",
            total=steps_per_epoch * arguments.epochs,
            completed=progress.total_steps,
            epoch=min(progress.epoch + 1, arguments.epochs),
            loss="-",
        )
        with ExitStack() as stack:
            stack.enter_context(_leave_errors_to_callers())
            # Hides what a killed run, or an earlier one in this folder, has logged for the steps to come.
            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=progress.total_steps + 1)
            stack.callback(self._close_writer)
            self._cleanup = stack.pop_all()

    def __enter__(self) -> ConsoleReporter:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self._cleanup.close()

    def _close_writer(self) -> None:
        with suppress(OSError):  # the last checkpoint has flushed all there was, or told why it could not
            self._writer.close()

    def on_step(self, progress: Progress, sums: Sums) -> None:
        self._log(progress, {"step/train_loss": sums.mean_loss})
        self._bars.update(
            self._task, completed=progress.total_steps, epoch=progress.epoch + 1, loss=f"{sums.mean_loss:.4f}"
        )

    def on_epoch(self, progress: Progress, record: EpochRecord) -> None:
        self._log(progress, {f"epoch/{name}": value for name, value in dataclasses.asdict(record).items()})

    def on_checkpoint(self) -> None:
        # Whoever goes on from the checkpoint logs only what comes after it.
        self._writer.flush()

    def _log(self, progress: Progress, scalars: dict[str, float]) -> None:
        with suppress(OSError):  # TensorBoard keeps it, and the next checkpoint's flush raises it
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, progress.total_steps)

    def on_finish(self, progress: Progress, ranks: int, device: str) -> None:
        metrics = collect_metrics(self._arguments, progress, ranks, device)
        text = json.dumps(metrics, indent=2) + "\n"
        write_atomically(self._folder / "metrics.json", lambda file: file.write(text.encode()))
        draw_plot(self._folder / "training.png", progress.history)
        self._console.print(_build_table(progress.history))
        self._console.print(
            f"{self._arguments.model}, {self._arguments.normalization}, {ranks} rank(s) on {device}: "
            f"{progress.total_steps} steps in {progress.seconds:.0f} s; all of it in {self._folder}"
        )


def collect_metrics(arguments: Arguments, progress: Progress, ranks: int, device: str) -> dict[str, Any]:
    """The content of metrics.json."""
    return {
        "test_accuracy": progress.history[-1].test_accuracy,
        "seconds": progress.seconds,
        "steps": progress.total_steps,
        "ranks": ranks,
        "device": device,
        "arguments": dataclasses.asdict(arguments),
        "history": [dataclasses.asdict(record) for record in progress.history],
    }


def draw_plot(path: Path, history: list[EpochRecord]) -> None:
    """Loss and accuracy by epoch, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = range(1, len(history) + 1)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "test"):
            axes.plot(epochs, [getattr(r, f"{part}_{quantity}") for r in history], marker="o", label=part)
        axes.set(xlabel="epoch", ylabel=quantity, xticks=list(epochs))
        axes.legend()
    write_atomically(path, FigureCanvasAgg(figure).print_png)


def _build_table(history: list[EpochRecord]) -> Any:
    from rich.table import Table

    table = Table("epoch", "train loss", "train accuracy", "test loss", "test accuracy")
    for epoch, record in enumerate(history, 1):
        table.add_row(
            str(epoch),
            f"{record.train_loss:.4f}",
            f"{record.train_accuracy:.2%}",
            f"{record.test_loss:.4f}",
            f"{record.test_accuracy:.2%}",
        )
    return table
