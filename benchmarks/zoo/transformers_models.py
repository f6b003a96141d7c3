"""transformers: networks with BatchNorm, built small from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from benchmarks.zoo.families import Built, Model

_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
_VIT = {**_TEXT, "image_size": 64, "patch_size": 16, "num_hidden_layers": 4}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1]}
_DPT = {
    **_VIT,
    "is_hybrid": False,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [16, 16, 32, 32],
    "fusion_hidden_size": 16,
    "use_batch_norm_in_fusion_residual": True,
}
_CONFORMER = {**_TEXT, "num_mel_bins": 16, "encoder_layers": 1}


def _images(side: int, channels: int = 3) -> Callable[[int], dict[str, Any]]:
    return lambda size: {"pixel_values": torch.randn(size, channels, side, side)}


def _series(length: int, channels: int) -> Callable[[int], dict[str, Any]]:
    return lambda size: {"past_values": torch.randn(size, length, channels)}


_Entry = tuple[str, str, dict[str, Any], Callable[[int], dict[str, Any]]]
"""The model's class, its configuration's, what is set in it, and inputs of so many examples."""

_ENTRIES: list[_Entry] = [
    ("AlignVisionModel", "AlignVisionConfig", {"image_size": 64}, _images(64)),
    ("BeitForSemanticSegmentation", "BeitConfig", {**_VIT, "out_indices": [1, 2, 3, 4]}, _images(64)),
    (
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        _images(64),
    ),
    (
        "Data2VecVisionForSemanticSegmentation",
        "Data2VecVisionConfig",
        {**_VIT, "out_indices": [1, 2, 3, 4]},
        _images(64),
    ),
    (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        _images(64),
    ),
    (
        "GLPNForDepthEstimation",
        "GLPNConfig",
        {
            "hidden_sizes": [16, 32, 64, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
        _images(64),
    ),
    ("HGNetV2ForImageClassification", "HGNetV2Config", {}, _images(64)),
    (
        "LevitForImageClassification",
        "LevitConfig",
        {
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "image_size": 64,
        },
        _images(64),
    ),
    ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25}, _images(64)),
    ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.35}, _images(64)),
    ("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", {"depth_multiplier": 0.35}, _images(64)),
    (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 48]},
        _images(64),
    ),
    (
        "MobileViTForSemanticSegmentation",
        "MobileViTConfig",
        {"hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 48]},
        _images(64),
    ),
    ("MobileViTV2ForImageClassification", "MobileViTV2Config", {"width_multiplier": 0.5}, _images(64)),
    (
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
        _images(64),
    ),
    ("ResNetForImageClassification", "ResNetConfig", _RESNET, _images(64)),
    (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
        _images(64),
    ),
    (
        "SwiftFormerForImageClassification",
        "SwiftFormerConfig",
        {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 64, 64], "image_size": 64},
        _images(64),
    ),
    ("TextNetForImageClassification", "TextNetConfig", {}, _images(64)),
    ("DPTForDepthEstimation", "DPTConfig", _DPT, _images(64)),
    ("DPTForSemanticSegmentation", "DPTConfig", _DPT, _images(64)),
    (
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {"hidden_size": 32, "auxiliary_channels": 16, "auxiliary_in_channels": 1024},
        _images(64),
    ),
    (
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        {"num_input_channels": 2, "context_length": 32, "d_model": 16, "norm_type": "batchnorm"},
        _series(32, 2),
    ),
    (
        "PatchTSMixerForPrediction",
        "PatchTSMixerConfig",
        {"num_input_channels": 2, "context_length": 32, "d_model": 8, "norm_mlp": "BatchNorm"},
        _series(32, 2),
    ),
    ("PPLCNetForImageClassification", "PPLCNetConfig", {}, _images(64)),
    (
        "VitPoseForPoseEstimation",
        "VitPoseConfig",
        {"use_simple_decoder": False},
        lambda size: {"pixel_values": torch.randn(size, 3, 256, 192)},
    ),
    (
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        _TEXT,
        lambda size: {"input_values": torch.randn(size, 8000)},
    ),
    (
        "HubertModel",
        "HubertConfig",
        {**_TEXT, "conv_pos_batch_norm": True},
        lambda size: {"input_values": torch.randn(size, 8000)},
    ),
    (
        "SpeechT5ForTextToSpeech",
        "SpeechT5Config",
        {"hidden_size": 24, "encoder_layers": 1, "decoder_layers": 1},
        lambda size: {
            "input_ids": torch.randint(3, 80, (size, 7)),
            "attention_mask": torch.ones(size, 7, dtype=torch.long),
            "labels": torch.randn(size, 8, 80),
            "decoder_attention_mask": torch.ones(size, 8, dtype=torch.long),
            "speaker_embeddings": torch.randn(size, 512),
        },
    ),
    (
        "ClapAudioModel",
        "ClapAudioConfig",
        {"enable_fusion": True},
        lambda size: {
            "input_features": torch.randn(size, 4, 1001, 64),
            "is_longer": torch.ones(size, 1, dtype=torch.bool),
        },
    ),
    (
        "InformerForPrediction",
        "InformerConfig",
        {
            "prediction_length": 4,
            "context_length": 16,
            "lags_sequence": [1, 2],
            "num_time_features": 1,
            "d_model": 16,
            "distil": True,
            "encoder_layers": 2,
        },
        lambda size: {
            "past_values": torch.randn(size, 18),
            "past_time_features": torch.randn(size, 18, 1),
            "past_observed_mask": torch.ones(size, 18),
            "future_values": torch.randn(size, 4),
            "future_time_features": torch.randn(size, 4, 1),
        },
    ),
    (
        "GroupViTModel",
        "GroupViTConfig",
        {},
        lambda size: {"pixel_values": torch.randn(size, 3, 224, 224), "input_ids": torch.randint(3, 80, (size, 7))},
    ),
    ("ParakeetEncoder", "ParakeetEncoderConfig", {**_TEXT}, lambda size: {"input_features": torch.randn(size, 64, 80)}),
    ("RTDetrForObjectDetection", "RTDetrConfig", {"freeze_backbone_batch_norms": False}, _images(128)),
    ("RTDetrV2ForObjectDetection", "RTDetrV2Config", {"freeze_backbone_batch_norms": False}, _images(128)),
    ("DFineForObjectDetection", "DFineConfig", {"freeze_backbone_batch_norms": False}, _images(128)),
    (
        "SuperGlueForKeypointMatching",
        "SuperGlueConfig",
        {},
        lambda size: {"pixel_values": torch.rand(size, 2, 3, 96, 96)},
    ),
    ("EfficientLoFTRModel", "EfficientLoFTRConfig", {}, lambda size: {"pixel_values": torch.rand(size, 2, 3, 96, 96)}),
    ("ZoeDepthForDepthEstimation", "ZoeDepthConfig", {"use_batch_norm_in_fusion_residual": True}, _images(64)),
    ("LasrEncoder", "LasrEncoderConfig", {**_TEXT}, lambda size: {"input_features": torch.randn(size, 64, 128)}),
]


def list_models() -> Iterator[Model]:
    return (Model(config.removesuffix("Config"), name) for name, config, _, _ in _ENTRIES)


def build(name: str) -> Built:
    kind, config, settings, make = next(entry for entry in _ENTRIES if entry[0] == name)
    model: Any = _find(kind)(_find(config)(**settings))
    return model, lambda size: model(**make(size))


def _find(name: str) -> Any:
    return getattr(transformers, name)
