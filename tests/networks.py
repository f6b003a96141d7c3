"""Real networks of monai and transformers with BatchNorm: small, random weights, nothing downloaded.

Dropout and stochastic depth are off: they draw differently for a whole batch and for its parts. The packages are
imported where they are used, so that a rank process loads no more than its test needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncaccum import convert_sync_accum


@dataclass(frozen=True)
class Network:
    """A network and what tests need to know of it.

    Args:
        build: makes it.
        example: shape of one example.
        layers: how many BatchNorm layers it has.
        zeros: how many of its parameters have a gradient that is zero by algebra.
        tolerance: allowed relative error of a parameter's gradient.
        takes_empty: whether its own forward works without examples.
    """

    build: Callable[[], nn.Module]
    example: tuple[int, ...]
    layers: int
    zeros: int = 0
    tolerance: float = 1e-9
    takes_empty: bool = True

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """A converted model and an unconverted one with the same parameters and buffers, float64, training."""
        reference = self.build().double().train()
        with torch.no_grad():  # as after some training: new weights of BatchNorm are ones, and biases zeros
            for parameter in reference.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model = self.build().double().train()
        model.load_state_dict(reference.state_dict())
        return convert_sync_accum(model), reference

    def examples(self, count: int) -> Tensor:
        return torch.randn(count, *self.example, dtype=torch.float64) + 0.5


def flatten_output(output: Any) -> Tensor:
    """All of a network's output, a row for each example."""
    tensors = [output] if isinstance(output, Tensor) else [t for t in output.values() if isinstance(t, Tensor)]
    return torch.cat([t.flatten(1) for t in tensors], 1)


def loss_of(output: Any) -> Tensor:
    """A sum over examples, so that losses of parts add up, and that every output has a part in."""
    values = flatten_output(output)
    return (values.square() + values * torch.linspace(-1, 1, values.shape[1], dtype=values.dtype)).sum()


def assert_same_gradients(network: Network, model: nn.Module, reference: nn.Module, scale: float = 1.0) -> None:
    """Each gradient of ``model`` equals ``scale`` times that of ``reference``, relative to its own largest entry."""
    expected = {name: p.grad * scale for name, p in reference.named_parameters() if p.grad is not None}
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    # Relative error has no meaning where the gradient is zero by algebra and both sides hold rounding: a shift of a
    # channel that the next BatchNorm takes out again, or of all attention scores of a row. Rounding is below 1e-13 of
    # the network's largest gradient, any other gradient in these networks above 1e-7 of it.
    floor = 1e-11 * max(float(g.abs().max()) for g in expected.values())
    zeros = [name for name, gradient in expected.items() if gradient.abs().max() < floor]
    assert len(zeros) == network.zeros, zeros
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).abs().max())
        allowed = floor if name in zeros else network.tolerance * float(gradient.abs().max())
        assert error <= allowed, f"{name}: gradient off by {error:.1e}, allowed {allowed:.1e}"


def assert_same_buffers(model: nn.Module, reference: nn.Module) -> None:
    for (name, actual), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        atol = 1e-12 * float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=f"{name}: {{}}".format)


def _monai(name: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from monai.networks import nets

        return getattr(nets, name)(*args, **kwargs)

    return build


def _transformers(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))

    return build


_NO_DROPOUT_PATCHTST = dict.fromkeys(("attention_dropout", "positional_dropout", "path_dropout", "ff_dropout"), 0.0)
_NO_DROPOUT_CONFORMER = dict.fromkeys(
    (
        *("activation_dropout", "attention_dropout", "conformer_conv_dropout", "feat_proj_dropout", "hidden_dropout"),
        *("layerdrop", "mask_time_prob"),
    ),
    0.0,
)

NETWORKS = {
    # Biases before each BatchNorm.
    "BasicUNet, 3D": Network(
        _monai("BasicUNet", 3, 1, 2, (4, 4, 8, 8, 8, 4), norm="batch"), (1, 16, 16, 16), layers=18, zeros=18
    ),
    # Residual units, PReLU, transposed convolutions; biases before each BatchNorm.
    "UNet, 2D": Network(
        _monai("UNet", 2, 1, 2, (4, 8, 16), (2, 2), num_res_units=2, norm="batch"), (1, 16, 16), layers=9, zeros=9
    ),
    "SegResNet, 3D": Network(
        _monai("SegResNet", 3, 4, 1, 2, norm="batch", blocks_down=(1, 2, 2), blocks_up=(1, 1)), (1, 8, 8, 8), layers=15
    ),
    "DenseNet121": Network(_monai("DenseNet121", 2, 1, 5, init_features=8, growth_rate=4), (1, 32, 32), layers=121),
    "ResNet": Network(
        _transformers(
            "ResNet", embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], layer_type="basic"
        ),
        (3, 32, 32),
        layers=20,
        tolerance=1e-12,
    ),
    # The biases of its bottlenecks' last BatchNorm only shift what later BatchNorm layers see.
    "MobileNetV2": Network(
        _transformers("MobileNetV2", depth_multiplier=0.25, finegrained_output=False, classifier_dropout_prob=0.0),
        (3, 64, 64),
        layers=52,
        zeros=17,
    ),
    # Grouped convolutions, squeeze and excitation.
    "RegNet": Network(
        _transformers("RegNet", embedding_size=16, hidden_sizes=[32, 32, 48, 48], depths=[1, 2, 2, 1], groups_width=8),
        (3, 32, 32),
        layers=23,
    ),
    # Attention between BatchNorm layers that see (N * tokens, C). Biases of keys, and of what BatchNorm follows.
    "LeViT": Network(
        _transformers(
            "Levit",
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 3, 4],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            drop_path_rate=0,
            down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
        ),
        (3, 64, 64),
        layers=26,
        zeros=8,
        takes_empty=False,
    ),
    # A time series transformer that normalises (N, C, T). Biases of keys.
    "PatchTST": Network(
        _transformers(
            "PatchTST",
            num_input_channels=2,
            context_length=24,
            patch_length=4,
            patch_stride=4,
            num_hidden_layers=3,
            d_model=16,
            num_attention_heads=2,
            ffn_dim=32,
            norm_type="batchnorm",
            do_mask_input=False,
            **_NO_DROPOUT_PATCHTST,
        ),
        (24, 2),
        layers=6,
        zeros=3,
        takes_empty=False,
    ),
    # Speech; BatchNorm1d inside its convolution modules. Biases of keys.
    "Conformer": Network(
        _transformers(
            "Wav2Vec2Conformer",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=[8, 8],
            conv_stride=[5, 4],
            conv_kernel=[10, 8],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            conv_depthwise_kernel_size=7,
            **_NO_DROPOUT_CONFORMER,
        ),
        (400,),
        layers=2,
        zeros=2,
        takes_empty=False,
    ),
}
