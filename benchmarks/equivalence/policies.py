"""How each policy changes the network, once, before training."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.equivalence.cases import OURS, Case
from benchmarks.equivalence.peers import MovingAverageNorm, OnlineNorm
from syncaccum import SyncAccumBatchNorm, convert_sync_accum

_GROUPS = 8

# Of policies that are "renorm" with another setting; the paper counts no prior observation and clips wider.
_SETTINGS = {
    "renorm-prior2": {"prior_count": 2.0},
    "renorm-prior4": {"prior_count": 4.0},
    "renorm-ioffe": {"prior_count": 0.0, "r_max": 3.0, "d_max": 5.0},
}
# The policies of layers; under lookahead and exact a layer's own does not matter.
_NAMES = ("running", "batch", "renorm", "window")


def apply_policy(model: nn.Module, case: Case) -> bool:
    """Change the BatchNorm layers in place; says whether there are statistics to commit."""
    if case.policy in OURS:
        _convert(model, case.policy)
        return True
    makers: dict[str, Callable[[_BatchNorm], nn.Module]] = {
        "groupnorm": _make_group_norm,
        "online": OnlineNorm,
        "mabn": lambda layer: MovingAverageNorm(layer, case.micro_batches),
    }
    if case.policy in makers:
        _replace(model, makers[case.policy])
    return False


def _convert(model: nn.Module, policy: str) -> None:
    convert_sync_accum(model, normalization=policy if policy in _NAMES else "renorm")
    for layer in model.modules():
        if isinstance(layer, SyncAccumBatchNorm):
            for name, value in _SETTINGS.get(policy, {}).items():
                setattr(layer, name, value)


def _replace(module: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> None:
    """Put another layer with the same affine parameters in each BatchNorm's place."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, make(child))
        else:
            _replace(child, make)


def _make_group_norm(child: _BatchNorm) -> nn.Module:
    layer = nn.GroupNorm(math.gcd(_GROUPS, child.num_features), child.num_features, child.eps)
    layer.weight, layer.bias = child.weight, child.bias
    return layer
