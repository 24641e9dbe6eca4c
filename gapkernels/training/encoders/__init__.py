"""Encoders for each kind of input, and the model that projects all of them into one space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gapkernels.errors import UserError, printable
from gapkernels.training.config import EncoderConfig, Model
from gapkernels.training.data import ImageSpec, InputSpec, TextSpec, VectorSpec
from gapkernels.training.encoders.base import Encoder
from gapkernels.training.encoders.features import MLP
from gapkernels.training.encoders.image import FastCNN, ImageCNN, ResNet, SpectrogramCNN, ViT
from gapkernels.training.encoders.open_clip import OpenCLIPImage, OpenCLIPText
from gapkernels.training.encoders.text import TextTransformer

# The encoder of each kind in the configuration, and what it reads.
_ENCODERS: dict[str, tuple[Any, type]] = {
    "image-cnn": (ImageCNN, ImageSpec),
    "fast-cnn": (FastCNN, ImageSpec),
    "resnet18": (ResNet, ImageSpec),
    "resnet50": (ResNet, ImageSpec),
    "vit": (ViT, ImageSpec),
    "spectrogram-cnn": (SpectrogramCNN, ImageSpec),
    "text-transformer": (TextTransformer, TextSpec),
    "mlp": (MLP, VectorSpec),
    "open-clip-image": (OpenCLIPImage, ImageSpec),
    "open-clip-text": (OpenCLIPText, TextSpec),
}


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
        try:
            self.encoders = nn.ModuleDict(encoders)
        except KeyError as error:  # a name with a dot, or that of a method of the module
            raise UserError(f"model.encoders: no modality can be called so ({printable(error.args[0])})") from error
        self.heads = nn.ModuleDict(
            {name: nn.Linear(encoder.output_width, config.embed_dim, bias=False) for name, encoder in encoders.items()}
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode inputs by modality into embeddings [N, D] by modality, not normalised."""
        dtype = next(self.heads.parameters()).dtype
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        return {name: self.heads[name](encoder(inputs[name])) for name, encoder in self.encoders.items()}


def _build_encoder(modality: str, config: EncoderConfig, spec: InputSpec) -> Encoder:
    encoder, readable = _ENCODERS[config.kind]
    if not isinstance(spec, readable):
        raise UserError(f"model.encoders.{modality}: {config.kind} cannot read this modality ({type(spec).__name__})")
    try:
        return encoder(config, spec)
    except UserError as error:
        raise UserError(f"model.encoders.{modality}: {error}") from error
