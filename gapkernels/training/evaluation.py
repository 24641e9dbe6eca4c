"""Embeddings of a split, and the metrics of a checkpoint or of a file of embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from gapkernels.metrics import evaluate
from gapkernels.training.checkpoint import load_checkpoint
from gapkernels.training.config import Config
from gapkernels.training.data import Split, load_dataset
from gapkernels.training.embeddings import SUFFIXES, Embeddings, read_embeddings
from gapkernels.training.encoders import MultimodalModel
from gapkernels.training.errors import UserError
from gapkernels.training.layout import CHECKPOINT


def embed(model: MultimodalModel, split: Split, device: torch.device, batch_size: int = 1024) -> dict[str, Tensor]:
    """Encode a whole split, in batches and without gradients.

    Returns:
        Embeddings [N, D] float32 by modality, on the CPU.
    """
    model.eval()
    with torch.inference_mode():
        parts = [model(split.batch(indices, device)) for indices in torch.arange(len(split)).split(batch_size)]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in model.encoders}


def evaluate_file(path: Path, anchor: str | None, data_dir: Path | None, device: torch.device) -> dict[str, float]:
    """Return every metric of a checkpoint, on its data set's test split, or of a file of embeddings.

    Args:
        path: a checkpoint, the folder of a run, or a .npz or .safetensors file.
        anchor: modality the others are retrieved from and by; by default that of the checkpoint's configuration, or
            the first one in the file.
        data_dir: folder with the data set's files, for a checkpoint.
        device: where to encode.

    Raises:
        UserError: if the file cannot be used, or does not know the anchor.
    """
    if path.is_dir():
        path = path / CHECKPOINT
    if path.suffix in SUFFIXES:
        found = read_embeddings(path)
    else:
        found, default_anchor = _embed_with_checkpoint(path, data_dir, device)
        anchor = anchor or default_anchor
    if anchor is not None and anchor not in found.modalities:
        raise UserError(f"unknown anchor {anchor!r}; modalities: {', '.join(found.modalities)}")
    try:
        return evaluate(dict(found.modalities), labels=found.labels, ids=found.ids, anchor=anchor)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _embed_with_checkpoint(path: Path, data_dir: Path | None, device: torch.device) -> tuple[Embeddings, str]:
    state = load_checkpoint(path)
    try:
        config = Config.model_validate(state["config"])
        dataset = load_dataset(config.data, data_dir)
        model = MultimodalModel(config.model, dataset.specs).to(device)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, ValidationError) as error:
        raise UserError(f"{path} is not a checkpoint of this version of gapkernels train") from error
    split = dataset.test
    return Embeddings(embed(model, split, device), split.labels, split.ids), config.model.anchor
