"""Towers of open_clip models, built by name; open_clip is an optional package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gapkernels.errors import UserError
from gapkernels.training.config import OpenCLIPConfig
from gapkernels.training.data import ImageSpec, TextSpec
from gapkernels.training.encoders.base import Encoder


class OpenCLIPImage(Encoder):
    """Image tower of an open_clip model; images are scaled to the size the tower reads."""

    def __init__(self, config: OpenCLIPConfig, spec: ImageSpec) -> None:
        super().__init__()
        if spec.channels != 3:
            raise UserError(f"{config.kind} reads images with 3 channels, these have {spec.channels}")
        model = _create_model(config)
        self.tower = model.visual
        side: int | tuple[int, int] = model.visual.image_size
        self.size = (side, side) if isinstance(side, int) else tuple(side)
        self.output_width = _width_of(self.tower, torch.zeros(2, 3, *self.size))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [N, 3, H, W] into features [N, output_width]."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False)
        return self.tower(images)


class OpenCLIPText(Encoder):
    """Text tower of an open_clip model, over the token numbers of this package's own tokenizer.

    Only the architecture is open_clip's: token numbers mean something else to pre-trained weights.
    """

    def __init__(self, config: OpenCLIPConfig, spec: TextSpec) -> None:
        super().__init__()
        if config.weights is not None:
            raise UserError(f"{config.kind} takes no weights: they belong to a tokenizer of their own")
        model = _create_model(config)
        if spec.length > model.context_length or spec.vocabulary_size > model.vocab_size:
            raise UserError(
                f"{config.model} reads up to {model.context_length} tokens out of {model.vocab_size}, "
                f"the captions have {spec.length} out of {spec.vocabulary_size}"
            )
        # The vision tower goes, its parameters would only take memory.
        model.visual = torch.nn.Identity()
        self.model = model
        self.context_length = model.context_length
        # The text tower reads its feature where the largest number stands: CLIP's end of text.
        self.end_of_text = model.vocab_size - 1
        self.output_width = _width_of(self, torch.zeros(2, spec.length, dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode token numbers [N, L] (int64, 0 is padding) into features [N, output_width]."""
        padded = F.pad(tokens, (0, self.context_length - tokens.shape[1]))
        lengths = (padded != 0).sum(dim=1, keepdim=True).clamp(max=self.context_length - 1)
        return self.model.encode_text(padded.scatter(1, lengths, self.end_of_text))


def _create_model(config: OpenCLIPConfig) -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"{config.kind} needs open_clip: pip install open_clip_torch") from error
    if config.model not in open_clip.list_models():
        raise UserError(f"open_clip knows no model {config.model!r}; open_clip.list_models() names those it knows")
    if config.weights is not None and not Path(config.weights).is_file():
        raise UserError(f"no weights at {config.weights}")
    return open_clip.create_model(config.model, pretrained=config.weights)


def _width_of(tower: torch.nn.Module, inputs: Tensor) -> int:
    training = tower.training
    tower.eval()
    with torch.no_grad():
        width = tower(inputs).shape[-1]
    tower.train(training)
    return width
