"""Encoders for each kind of input, and the model that projects all of them into one space."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gapkernels.training.config import EncoderConfig, ImageCNNConfig, Model, TextTransformerConfig
from gapkernels.training.data import ImageSpec, InputSpec, TextSpec
from gapkernels.training.data.tokenizer import PADDING
from gapkernels.training.errors import UserError


class Encoder(nn.Module):
    """Turns one modality into features [N, output_width]."""

    output_width: int


class ImageCNN(Encoder):
    """Residual convolutional encoder: each stage halves the resolution and doubles the channels.

    Group norm instead of batch norm: a sample's embedding must not depend on the other samples of its batch, or the
    loss could not be computed in micro-batches.
    """

    def __init__(self, config: ImageCNNConfig, spec: ImageSpec) -> None:
        super().__init__()
        widths = [config.width * 2**stage for stage in range(config.depth)]
        self.stem = nn.Conv2d(spec.channels, config.width, kernel_size=3, padding=1)
        self.stages = nn.Sequential(
            *(
                _ResidualStage(width_in, width_out, stride=1 if stage == 0 else 2)
                for stage, (width_in, width_out) in enumerate(zip([config.width, *widths], widths, strict=False))
            )
        )
        self.output_width = widths[-1]
        # The faster layout for convolutions, on CPUs and GPUs alike.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [N, C, H, W] into features [N, output_width]."""
        return self.stages(self.stem(images)).mean(dim=(2, 3))


class _ResidualStage(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.GroupNorm(math.gcd(8, width_in), width_in),
            nn.GELU(),
            nn.Conv2d(width_in, width_out, kernel_size=3, stride=stride, padding=1),
            nn.GroupNorm(math.gcd(8, width_out), width_out),
            nn.GELU(),
            nn.Conv2d(width_out, width_out, kernel_size=3, padding=1),
        )
        same_shape = width_in == width_out and stride == 1
        self.shortcut = nn.Identity() if same_shape else nn.Conv2d(width_in, width_out, kernel_size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class TextTransformer(Encoder):
    """Pre-norm transformer over token numbers; the mean over the tokens that are not padding is the feature."""

    def __init__(self, config: TextTransformerConfig, spec: TextSpec) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocabulary_size, config.width, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.randn(spec.length, config.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            dim_feedforward=4 * config.width,
            dropout=config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(config.width)
        self.layers = nn.TransformerEncoder(layer, config.depth, norm=norm, enable_nested_tensor=False)
        self.output_width = config.width

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode token numbers [N, L] (int64, 0 is padding) into features [N, output_width]."""
        padding = tokens == PADDING
        # A caption without any token would have every key masked and attend to nothing: let it see one padding token.
        padding = padding & ~(
            padding.all(dim=1, keepdim=True) & (torch.arange(tokens.shape[1], device=tokens.device) == 0)
        )
        states = self.layers(self.tokens(tokens) + self.positions, src_key_padding_mask=padding)
        weight = (~padding).unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(dim=1) / weight.sum(dim=1)


class MultimodalModel(nn.Module):
    """One encoder and one linear projection head per modality.

    Args:
        config: encoders by modality and the dimension D of the joint space.
        specs: shape of the inputs by modality.

    Raises:
        UserError: if the encoders and the data set's modalities do not match.
    """

    def __init__(self, config: Model, specs: Mapping[str, InputSpec]) -> None:
        super().__init__()
        if set(config.encoders) != set(specs):
            raise UserError(
                f"model.encoders names the modalities {', '.join(sorted(config.encoders))}, "
                f"the data set has {', '.join(sorted(specs))}"
            )
        encoders = {name: _build_encoder(name, config.encoders[name], specs[name]) for name in config.encoders}
        self.encoders = nn.ModuleDict(encoders)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(encoder.output_width, config.embed_dim, bias=False) for name, encoder in encoders.items()}
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode inputs by modality into embeddings [N, D] by modality, not normalised."""
        return {name: self.heads[name](encoder(inputs[name])) for name, encoder in self.encoders.items()}


def _build_encoder(modality: str, config: EncoderConfig, spec: InputSpec) -> Encoder:
    if isinstance(config, ImageCNNConfig) and isinstance(spec, ImageSpec):
        return ImageCNN(config, spec)
    if isinstance(config, TextTransformerConfig) and isinstance(spec, TextSpec):
        return TextTransformer(config, spec)
    raise UserError(f"model.encoders.{modality}: {config.kind} cannot read this modality ({type(spec).__name__})")
