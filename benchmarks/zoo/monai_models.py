"""MONAI: its networks with BatchNorm, small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

from benchmarks.zoo.families import Built, Model

nets: Any = import_module("monai.networks.nets")  # it does not export what it has

_WIDTHS = {"channels": (8, 16, 32), "strides": (2, 2)}
_PLAIN = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_BATCH = {**_PLAIN, "norm": "batch"}
_KERNELS = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)}
_RESNET = {"spatial_dims": 2, "n_input_channels": 1, "num_classes": 2}
_SENET = {"spatial_dims": 2, "in_channels": 3, "num_classes": 2}

_NETWORKS: dict[str, Callable[[], Any]] = {
    "AHNet": lambda: nets.AHNet(**_PLAIN),
    "AttentionUnet": lambda: nets.AttentionUnet(**_PLAIN, **_WIDTHS),
    "AutoEncoder": lambda: nets.AutoEncoder(**_BATCH, channels=(8, 16), strides=(2, 2)),
    "BasicUNet": lambda: nets.BasicUNet(**_BATCH, features=(8, 8, 16, 16, 32, 8)),
    "BasicUNetPlusPlus": lambda: nets.BasicUNetPlusPlus(**_BATCH, features=(8, 8, 16, 16, 32, 8)),
    "Classifier": lambda: nets.Classifier((1, 64, 64), 2, **_WIDTHS, norm="batch"),
    "Critic": lambda: nets.Critic((1, 64, 64), **_WIDTHS, norm="batch"),
    "DAF3D": lambda: nets.DAF3D(1, 2),
    "DenseNet121": lambda: nets.DenseNet121(**_PLAIN),
    "Discriminator": lambda: nets.Discriminator((1, 64, 64), **_WIDTHS, norm="batch"),
    "DynUNet": lambda: nets.DynUNet(**_PLAIN, **_KERNELS, norm_name="batch"),
    "EfficientNetBN": lambda: nets.EfficientNetBN("efficientnet-b0", False, spatial_dims=2, in_channels=1),
    "FlexibleUNet": lambda: nets.FlexibleUNet(1, 2, "efficientnet-b0"),
    "Generator": lambda: nets.Generator((64,), (16, 16, 16), (16, 8, 1), (2, 2, 1), norm="batch"),
    "HighResNet": lambda: nets.HighResNet(**_PLAIN),
    "HoVerNet": lambda: nets.HoVerNet(),
    "PatchDiscriminator": lambda: nets.PatchDiscriminator(2, 8, 1, num_layers_d=2),
    "ResNet": lambda: nets.resnet18(**_RESNET),
    "SEResNet50": lambda: nets.SEResNet50(**_SENET),
    "SEResNext50": lambda: nets.SEResNext50(**_SENET),
    "SegResNet": lambda: nets.SegResNet(**_BATCH),
    "SegResNetDS": lambda: nets.SegResNetDS(**_BATCH),
    "UNet": lambda: nets.UNet(**_BATCH, **_WIDTHS, num_res_units=1),
    "VNet": lambda: nets.VNet(**_PLAIN, dropout_prob_down=None, dropout_prob_up=(None, 0.5)),
    "VoxelMorph": lambda: nets.VoxelMorph(_make_registration(), spatial_dims=2),
}

_SIZES = {
    "AHNet": (1, 128, 128), "DAF3D": (1, 32, 32, 32), "DynUNet": (1, 64, 64), "Generator": (64,),
    "HoVerNet": (3, 256, 256), "SEResNet50": (3, 64, 64), "SEResNext50": (3, 64, 64),
}  # fmt: skip
"""Of one example, where it is no image of one channel and 64 by 64."""


def _make_registration() -> Any:
    """What tells how one image moves to the other."""
    widths = {"channels": (8, 8, 16, 16), "final_conv_channels": (8,)}
    return nets.VoxelMorphUNet(2, 2, 8, **widths, norm="batch")


def list_models() -> Iterator[Model]:
    return (Model(name, name) for name in _NETWORKS)


def build(name: str) -> Built:
    model, shape = _NETWORKS[name](), _SIZES.get(name, (1, 64, 64))
    if name == "VoxelMorph":
        return model, lambda size: model(torch.rand(size, *shape), torch.rand(size, *shape))
    return model, lambda size: model(torch.randn(size, *shape))
