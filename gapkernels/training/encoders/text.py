"""Encoders of captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gapkernels.training.config import TextTransformerConfig
from gapkernels.training.data import TextSpec
from gapkernels.training.data.tokenizer import PADDING
from gapkernels.training.encoders.base import Encoder


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
