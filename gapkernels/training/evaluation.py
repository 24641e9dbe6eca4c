"""Embeddings of a split, and the metrics of a checkpoint or of a file of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from gapkernels.metrics import clustering, evaluate
from gapkernels.training.checkpoint import load_checkpoint
from gapkernels.training.config import Config
from gapkernels.training.data import NO_CLASS, Split, load_dataset
from gapkernels.training.embeddings import SUFFIXES, Embeddings, read_embeddings
from gapkernels.training.encoders import MultimodalModel
from gapkernels.training.errors import UserError
from gapkernels.training.layout import CHECKPOINT

# A class of this size has a sample in the fifth that kNN and linear probe are tested on, and others to train on.
_CLASSIFIABLE = 5


def embed(model: MultimodalModel, split: Split, batch_size: int = 1024) -> dict[str, Tensor]:
    """Encode a whole split, in batches and without gradients, on the device that model and split are on.

    Returns:
        Embeddings [N, D] float32 by modality, on the CPU.
    """
    model.eval()
    with torch.inference_mode():
        batches = (split.batch(indices) for indices in torch.arange(len(split)).split(batch_size))
        parts = [model(split.prepare(batch)) for batch in batches]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in model.encoders}


def score(
    embeddings: Mapping[str, Tensor],
    labels: Tensor | None,
    ids: Tensor | None,
    anchor: str | None,
    classifiers: bool = True,
) -> dict[str, float]:
    """Return every metric that the samples allow.

    Geometry and retrieval take all samples; clustering and classification those that belong to one class. Without two
    such classes the latter are left out, and without five samples in any class kNN and linear probe are.

    Args:
        embeddings: by modality, each [N, D], on the CPU.
        labels: int64 [N], `NO_CLASS` for samples without a class; or None.
        ids: int64 [N], see `Split`; or None.
        anchor: modality the others are retrieved from and by.
        classifiers: whether to compute kNN and linear probe, which take most of the time.
    """
    metrics = evaluate(embeddings, ids=ids, anchor=anchor)
    if labels is None:
        return metrics
    kept = labels != NO_CLASS
    sizes = labels[kept].unique(return_counts=True)[1]
    if len(sizes) < 2:
        return metrics
    classified = {name: values[kept] for name, values in embeddings.items()}
    if classifiers and sizes.max() >= _CLASSIFIABLE:
        return (
            evaluate(classified, labels=labels[kept], ids=None if ids is None else ids[kept], anchor=anchor) | metrics
        )
    return metrics | clustering(list(classified.values()), labels[kept])._asdict()


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
        return score(found.modalities, found.labels, found.ids, anchor)
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
    split = dataset.test.to(device)
    return Embeddings(embed(model, split), split.labels, split.ids), config.model.anchor
