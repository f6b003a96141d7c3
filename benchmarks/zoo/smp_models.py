"""segmentation_models_pytorch: each decoder on one encoder, and each encoder under one decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import segmentation_models_pytorch as smp
import torch

from benchmarks.zoo.families import Built, Model, with_images

_DECODERS = (
    "unet",
    "unetplusplus",
    "manet",
    "linknet",
    "fpn",
    "pspnet",
    "deeplabv3",
    "deeplabv3plus",
    "pan",
    "upernet",
    "segformer",
)
_DPT = "dpt tu-vit_tiny_patch16_224"
"""DPT wants a transformer."""


_ENCODERS = (
    "densenet121",
    "dpn68",
    "efficientnet-b0",
    "inceptionresnetv2",
    "inceptionv4",
    "mit_b0",
    "mobilenet_v2",
    "mobileone_s0",
    "resnext50_32x4d",
    "se_resnet50",
    "se_resnext50_32x4d",
    "timm-efficientnet-b0",
    "timm-skresnet18",
    "timm-tf_efficientnet_lite0",
    "tu-mobilenetv3_small_050",
    "vgg11_bn",
    "xception",
)
"""The smallest of each kind; any of timm's is one, too."""


def list_models() -> Iterator[Model]:
    yield from (Model("decoder", f"{decoder} resnet18") for decoder in _DECODERS)
    yield Model("decoder", _DPT)
    yield from (Model("encoder", f"unet {encoder}") for encoder in _ENCODERS)


def _make(name: str) -> Any:
    decoder, encoder = name.split()
    return smp.create_model(decoder, encoder, encoder_weights=None)


def build(name: str) -> Built:
    return with_images(_make(name), lambda size, side: torch.randn(size, 3, side, side), [64, 128, 224])
