"""Embeddings of a split, and the metrics of a checkpoint or of a file of embeddings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from gapkernels.cpu import multiplies_bfloat16
from gapkernels.errors import UserError
from gapkernels.metrics import clustering, evaluate
from gapkernels.reading import check
from gapkernels.training.checkpoint import Checkpoint, load_checkpoint, load_weights
from gapkernels.training.config import validate_config
from gapkernels.training.data import Split, load_dataset
from gapkernels.training.embeddings import NO_CLASS, SUFFIXES, Embeddings, read_embeddings
from gapkernels.training.encoders import MultimodalModel
from gapkernels.training.layout import CHECKPOINT
from gapkernels.training.processes import Processes

# A class of so many groups has one in the fifth that kNN and linear probe are tested on, and others to train on.
_CLASSIFIABLE = 5
# One split tests a fifth of the groups. Of 300 recordings that is 60, and their luck moves the accuracy by two points.
_SPLITS_OF_GROUPS = 5


def compute_precision(precision: str, device: torch.device) -> str:
    """Return the precision that encoders run in; `auto` is bf16 where products in it are faster, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and multiplies_bfloat16()
    return "bf16" if fast else "fp32"


def embed(
    model: MultimodalModel,
    split: Split,
    batch_size: int = 1024,
    bfloat16: bool = False,
    processes: Processes | None = None,
) -> Embeddings:
    """Encode a whole split, in batches and without gradients, on the device that model and split are on.

    Args:
        model: the encoders.
        split: N samples.
        batch_size: samples to encode at a time.
        bfloat16: run the encoders under autocast, as in training.
        processes: which share the split; each encodes its part, and all get the whole.

    Returns:
        Embeddings, float32 on the CPU, with what the split says of its samples.
    """
    model.eval()
    device = split.modalities[next(iter(split.modalities))].device
    processes = processes or Processes(device)
    share = -(-len(split) // processes.size)
    own = torch.arange(len(split))[processes.rank * share : (processes.rank + 1) * share]
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        parts = [model(split.prepare(split.batch(indices))) for indices in own.split(batch_size)] if len(own) else []
    modalities = {}
    for name in model.encoders:
        head = model.heads[name]
        assert isinstance(head, nn.Linear)
        rows = [part[name].float() for part in parts] or [torch.empty(0, head.out_features, device=device)]
        modalities[name] = processes.gather_rows(torch.cat(rows), len(split))
    return Embeddings(modalities, split.labels, split.ids, split.groups)


def score(samples: Embeddings, anchor: str | None, classifiers: bool = True) -> dict[str, float]:
    """Return every metric that the samples allow.

    Geometry and retrieval take all samples; clustering and classification those that belong to one class. Without two
    such classes the latter are left out, and without five groups of samples in any class kNN and linear probe are.
    These are accuracies on one split, as in the paper; where samples come in groups, the mean over five.

    Args:
        samples: embeddings on the CPU; label `NO_CLASS` for samples without a class.
        anchor: modality the others are retrieved from and by.
        classifiers: whether to compute kNN and linear probe, which take most of the time.
    """
    metrics = evaluate(samples.modalities, ids=samples.ids, anchor=anchor)
    if samples.labels is None or isinstance(samples.ids, Mapping):
        return metrics
    kept = samples.labels != NO_CLASS
    labels = samples.labels[kept]
    if len(labels.unique()) < 2:
        return metrics
    classified = {name: values[kept] for name, values in samples.modalities.items()}
    groups = torch.arange(len(labels)) if samples.groups is None else samples.groups[kept]
    sizes = torch.stack([labels, groups], dim=1).unique(dim=0)[:, 0].unique(return_counts=True)[1]
    if classifiers and sizes.max() >= _CLASSIFIABLE:
        ids = None if samples.ids is None else samples.ids[kept]
        splits = 1 if samples.groups is None else _SPLITS_OF_GROUPS
        return evaluate(classified, labels=labels, ids=ids, groups=groups, anchor=anchor, splits=splits) | metrics
    return metrics | clustering(list(classified.values()), labels)._asdict()


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
    if found.labels is not None and (unlabelled := int((found.labels == NO_CLASS).sum())):
        print(
            f"{unlabelled} of {len(found.labels)} samples have label {NO_CLASS}, no class: clustering and "
            "classification leave them out",
            file=sys.stderr,
        )
    try:
        return score(found, anchor)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _embed_with_checkpoint(path: Path, data_dir: Path | None, device: torch.device) -> tuple[Embeddings, str]:
    state = load_checkpoint(path)
    foreign = f"{path} is not a checkpoint of this version of gapkernels train"
    try:
        checkpoint = check(state, Checkpoint, path)
        config = validate_config(checkpoint.config)
    except UserError as error:
        raise UserError(f"{foreign} ({error})") from error
    dataset = load_dataset(config.data, data_dir)
    model = MultimodalModel(config.model, dataset.specs).to(device)
    precision = compute_precision(config.optim.precision, device)
    if precision == "fp64":
        model.double()
    try:
        load_weights(model, checkpoint.model)
    except ValueError as error:
        raise UserError(f"{foreign}, or of other data ({error})") from error
    return embed(model, dataset.test.to(device), bfloat16=precision == "bf16"), config.model.anchor
