"""How each policy changes the network, once, before training."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncaccum import SyncAccumBatchNorm, convert_sync_accum

_GROUPS = 8

# Of policies that are "renorm" with another setting; the paper counts no prior observation and clips wider.
_SETTINGS = {
    "renorm-prior0": {"prior_count": 0.0},
    "renorm-ioffe": {"prior_count": 0.0, "r_max": 3.0, "d_max": 5.0},
}


def apply_policy(model: nn.Module, policy: str) -> bool:
    """Change the BatchNorm layers in place; says whether there are statistics to commit."""
    if policy in ("reference", "batchnorm"):
        return False
    if policy == "groupnorm":
        _replace_by_group_norm(model)
        return False
    convert_sync_accum(model, normalization=policy if policy in ("running", "batch") else "renorm")
    for layer in model.modules():
        if isinstance(layer, SyncAccumBatchNorm):
            for name, value in _SETTINGS.get(policy, {}).items():
                setattr(layer, name, value)
    return True


def _replace_by_group_norm(module: nn.Module) -> None:
    """Put a GroupNorm with the same affine parameters in each BatchNorm's place."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            layer = nn.GroupNorm(math.gcd(_GROUPS, child.num_features), child.num_features, child.eps)
            layer.weight, layer.bias = child.weight, child.bias
            setattr(module, name, layer)
        else:
            _replace_by_group_norm(child)
