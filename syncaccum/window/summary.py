"""summary: what each layer of a model is set to, and what its open window holds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from syncaccum.layer import fused, native
from syncaccum.layer.accumulate import is_counted
from syncaccum.layer.state import Accumulating, commit_momentum, has_statistics, tracks
from syncaccum.moments import Moments
from syncaccum.ranks.groups import describe_group
from syncaccum.torch_private import BatchNormBase, buffers_of, has_no_values, parameters_of
from syncaccum.window.layers import NamedLayer, named_layers
from syncaccum.window.table import Column, Page, make_renderables, render_page

Mode = Literal["accumulates", "eval", "not counted", "untracked", "normalises itself"]

_NO_TERMINAL = (160, 24)
"""In a file a line may be long, but not without end."""


@dataclass(frozen=True)
class LayerSummary:
    """One layer in a :class:`Summary`. None is for what there is not, or cannot be known, as on the meta device.

    Attributes:
        name: in the model, without the parts that wrappers such as DDP put in.
        channels: how many.
        mode: what a forward does now: ``"accumulates"``; ``"eval"``, as in a frozen layer; ``"not counted"``, inside
            ``not_counted`` or with momentum set to 0; ``"untracked"``, without running statistics or with
            track_running_stats off; ``"normalises itself"``, a subclass whose forward calls no batch_norm.
        policy: the normalization policy of a training forward.
        momentum: that of the next commit; None for the cumulative average.
        dtype, device: of the running statistics, or else of the weight.
        group: the ranks of a commit, as this rank knows them.
        kernels: what a training forward runs on data of that device: ``"compiled"``, the passes of this package for
            CPUs; ``"SyncBatchNorm"``, torch's kernels of that layer, on CUDA, or ``"SyncBatchNorm and Triton"`` where
            Triton's run between them; ``"torch"``, torch's operations; or ``"its own"``. Compiled models, transforms of
            torch.func and tensor subclasses get torch's in any case.
        micro_batches: how many forwards are in this rank's open window: two for each, where the layer is used twice.
            Forwards of compiled models are not among them.
        values: values per channel in this rank's open window, of all forwards.
        committed: how many global batches the running statistics know: ``num_batches_tracked``.
        mean_drift, deviation_drift: see :func:`summary`.
    """

    name: str
    channels: int
    mode: Mode
    policy: str
    momentum: float | None
    dtype: torch.dtype | None
    device: torch.device
    group: str
    kernels: str
    micro_batches: int | None
    values: int | None
    committed: int | None
    mean_drift: float | None
    deviation_drift: float | None


@dataclass(frozen=True, repr=False)
class Summary:
    """What :func:`summary` returns. As text it is a table; rich's ``print`` shows it with rich's colours.

    Attributes:
        layers: one for each, in module order.
        not_converted: the model's other BatchNorm layers, as ``named_modules`` names them.
        cpu_passes: for what processor the passes for CPUs were compiled, or why they are torch's; as the doctor says.
    """

    layers: tuple[LayerSummary, ...]
    not_converted: tuple[str, ...]
    cpu_passes: str

    def __repr__(self) -> str:
        return render_page(_build_page(self), shutil.get_terminal_size(_NO_TERMINAL).columns)

    def __rich_console__(self, console: Any, options: Any) -> Any:
        return make_renderables(_build_page(self), options.max_width)


def summary(model: nn.Module) -> Summary:
    r"""A table of a model's layers: their settings, open windows, committed batches, and how far the two have drifted.

    Changes nothing and communicates nothing: it may be called on one rank alone, at any time. It tells of this rank's
    windows. On a GPU it waits for the device.

    Drift says how far the open window's statistics are from the running ones. With mean m, population variance v and
    count n of this rank's window, running mean :math:`\mu` and running variance :math:`\sigma^2`:

    .. math::
        \mathrm{mean\_drift} &= \sqrt{\operatorname{mean}_c \frac{(m - \mu)^2}{\sigma^2 + \epsilon}} \\
        \mathrm{deviation\_drift} &= \sqrt{\operatorname{mean}_c
            \Bigl(\tfrac12 \ln \frac{v\,n/(n-1) + \epsilon}{\sigma^2 + \epsilon}\Bigr)^2}

    The first is in running standard deviations. The second is about the relative difference of the two deviations: 0.1
    is 10 %. Both are 0 where nothing differs. By chance alone they are about :math:`1/\sqrt n` and
    :math:`1/\sqrt{2n}`, if values are independent; neighbours in an image are not. They are None where the window is
    empty and where the running statistics are still the 0 and 1 of a new layer, and the second for a single value.

    Settings that all layers share are above the table. Its text, as ``print`` shows it, is laid out by rich where that
    is installed.

    Args:
        model: a module with SyncAccumBatchNorm layers, also inside DDP or torch.compile wrappers. A shared layer is
            listed once, and one without running statistics, too.

    Raises:
        NoLayersError: the model has no SyncAccumBatchNorm layer.

    Example::

        >>> model = syncaccum.convert_sync_accum(model)
        >>> for x, y in micro_batches[:2]:
        ...     loss_fn(model(x), y).backward()
        >>> table = syncaccum.summary(model)
        >>> [(layer.name, layer.micro_batches, layer.values) for layer in table.layers]
        [('1', 2, 576)]
    """
    by_window: dict[int, NamedLayer] = {}
    for name, layer in named_layers(model):
        # A layer and its copy.copy have one window.
        by_window.setdefault(id(layer._accumulation), (name, layer))
    layers = tuple(_describe_layer(name, layer) for name, layer in by_window.values())
    return Summary(layers, tuple(_name_others(model)), native.which())


def _name_others(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, BatchNormBase) and not isinstance(module, Accumulating):
            yield name


def _describe_layer(name: str, layer: Accumulating) -> LayerSummary:
    state, buffers = layer._accumulation, buffers_of(layer)
    known = [t for t in (buffers["running_mean"], parameters_of(layer).get("weight")) if t is not None]
    device = known[0].device if known else state.window.device
    window = _read_window(layer)
    values = None if window is None else int(window.count)
    batches = buffers["num_batches_tracked"]
    mean_drift, deviation_drift = _measure_drift(layer, window) if window is not None and values else (None, None)
    return LayerSummary(
        name=name,
        channels=layer.num_features,
        mode=_find_mode(layer),
        policy=state.normalization,
        momentum=commit_momentum(layer),
        dtype=known[0].dtype if known else None,
        device=device,
        group=describe_group(state.handle.group),
        kernels="its own" if state.normalises_itself else _name_kernels(device),
        micro_batches=state.micro_batches if has_statistics(layer) else None,
        values=values,
        committed=None if batches is None or has_no_values(batches) else int(batches),
        mean_drift=mean_drift,
        deviation_drift=deviation_drift,
    )


def _read_window(layer: Accumulating) -> Moments | None:
    packed = layer._accumulation.window
    return None if not has_statistics(layer) or has_no_values(packed) else Moments.unpack(packed.cpu())


def _find_mode(layer: Accumulating) -> Mode:
    if not tracks(layer):
        return "untracked"
    if layer._accumulation.normalises_itself:
        return "normalises itself"
    if not layer.training:
        return "eval"
    return "accumulates" if is_counted(layer) else "not counted"


def _name_kernels(device: torch.device) -> str:
    if device.type == "cuda":
        return "SyncBatchNorm and Triton" if fused.are_in_use() else "SyncBatchNorm"
    return "compiled" if device.type == "cpu" and native.which().startswith("compiled") else "torch"


def _measure_drift(layer: Accumulating, window: Moments) -> tuple[float | None, float | None]:
    """Of the mean and of the deviation, see `summary`."""
    buffers = buffers_of(layer)
    mean, variance = (_widen(buffers[name]) for name in ("running_mean", "running_var"))
    is_new = not mean.any() and bool((variance == 1).all())
    # Channels may have been pruned while the window is open.
    if is_new or mean.shape != window.mean.shape:
        return None, None
    scale = variance + layer.eps
    mean_drift = ((window.mean - mean).square() / scale).mean().sqrt().item()
    n = window.count.item()
    if n < 2:
        return mean_drift, None
    ratio = (window.variance * (n / (n - 1)) + layer.eps) / scale
    return mean_drift, (ratio.log() / 2).square().mean().sqrt().item()


def _widen(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer.detach().to("cpu", torch.float64)


def _build_page(table: Summary) -> Page:
    layers = table.layers
    texts: dict[str, list[str]] = {
        "mode": [layer.mode for layer in layers],
        "policy": [layer.policy for layer in layers],
        "momentum": ["average" if layer.momentum is None else f"{layer.momentum:g}" for layer in layers],
        "dtype": ["none" if layer.dtype is None else str(layer.dtype).removeprefix("torch.") for layer in layers],
        "device": [str(layer.device) for layer in layers],
        "group": [layer.group for layer in layers],
        "kernels": [layer.kernels for layer in layers],
    }
    numbers = {
        "channels": [_show_count(layer.channels) for layer in layers],
        "micro-batches": [_show_count(layer.micro_batches) for layer in layers],
        "values": [_show_count(layer.values) for layer in layers],
        "committed batches": [_show_count(layer.committed) for layer in layers],
        "mean drift": [_show_drift(layer.mean_drift) for layer in layers],
        "deviation drift": [_show_drift(layer.deviation_drift) for layer in layers],
    }
    shared = {header: cells[0] for header, cells in texts.items() if len(set(cells)) == 1}
    own = [Column(header, cells, is_number=False) for header, cells in texts.items() if header not in shared]
    names = Column("layer", [layer.name for layer in layers], is_number=False)
    columns = [names, *own, *(Column(header, cells) for header, cells in numbers.items())]
    return Page(_write_above(table, shared), columns, _write_below(table))


def _write_above(table: Summary, shared: Mapping[str, str]) -> list[str]:
    count = len(table.layers)
    settings = "; ".join(f"{header}: {cell}" for header, cell in shared.items())
    title = f"{count} SyncAccumBatchNorm layer{'s' if count > 1 else ''}"
    return [title, settings, ""] if settings else [title, ""]


def _write_below(table: Summary) -> list[str]:
    notes = [""]
    if any(layer.device.type == "cpu" for layer in table.layers):
        notes.append(f"passes for CPUs: {table.cpu_passes}")
    if table.not_converted:
        notes.append(f"not converted: {', '.join(table.not_converted)}")
    return notes if len(notes) > 1 else []


def _show_count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _show_drift(drift: float | None) -> str:
    # Three decimals: a window of a million values is 0.001 off by chance.
    return "" if drift is None else f"{drift:.3f}"
