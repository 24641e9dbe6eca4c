"""Encoder of pre-computed features."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from gapkernels.training.config import MLPConfig
from gapkernels.training.data import VectorSpec
from gapkernels.training.encoders.base import Encoder


class MLP(Encoder):
    """Layer norm, then hidden layers with GELU and dropout; the projection head is the output layer."""

    def __init__(self, config: MLPConfig, spec: VectorSpec) -> None:
        super().__init__()
        widths = [spec.width, *[config.width] * config.depth]
        # Features of different encoders come at different scales.
        layers: list[nn.Module] = [nn.LayerNorm(spec.width)]
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.GELU(), nn.Dropout(config.dropout)]
        self.layers = nn.Sequential(*layers)
        self.output_width = config.width

    def forward(self, features: Tensor) -> Tensor:
        """Encode features [N, D] into features [N, output_width]."""
        return self.layers(features)
