"""open_clip's contrastive loss, computed here, and its trainer running on it unchanged.

In a script:

    from gapkernels.integrations.open_clip import ClipLoss      # instead of: from open_clip.loss import ClipLoss

or for everything that open_clip makes from here on:

    from gapkernels.integrations.open_clip import patch
    patch(atp_weight=1.0, cu_weight=1.0)

Under open_clip's own trainer, all of its options after the two dashes:

    torchrun --nproc-per-node 8 -m gapkernels.integrations.open_clip --atp-weight 1 --cu-weight 1 -- \\
        --model RN50 --train-data ... --batch-size 1024

Signature and behaviour: ``open_clip.loss.ClipLoss``, open_clip_torch 3.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from gapkernels.distributed import MODES
from gapkernels.functional import gap_loss
from gapkernels.integrations._shared import replaced_class
from gapkernels.modules import centroid_weight, is_on

__all__ = ["ClipLoss", "WeightsWithoutEffectError", "apply_to_open_clip", "patch"]

_INSTALL = "pip install open_clip_torch"
_LOGITS_AT_ONCE = 2**24  # 64 MiB in float32


class WeightsWithoutEffectError(ValueError):
    """Weights of terms were given, and the loss that is trained has no such terms."""


class ClipLoss(replaced_class("open_clip.loss", "ClipLoss")):  # type: ignore[misc]
    """Drop-in for ``open_clip.loss.ClipLoss``: InfoNCE of the batch of all processes, in O(N·D) memory.

    Where open_clip is installed it is a subclass of that class. Features are taken as they are: open_clip's models
    normalise them. With weights for the other two terms it is the paper's loss, under open_clip's trainer too, which
    adds up what the loss returns. In a batch of one sample, which the last of an epoch may be, InfoNCE is zero and the
    centroid uniformity is left out with one warning.

    Args:
        local_loss, gather_with_grad: how open_clip spreads the batch over processes, which decides the gradient.
            With ``gather_with_grad`` the mean over processes that DistributedDataParallel takes is the gradient of the
            loss. Without it the gradient of the features is that divided by the number of processes. With
            ``local_loss`` alone features are constants where other rows are compared with them: a part of the gradient
            is left out, as there. Each tile is computed once in the whole world and every process returns the loss of
            the whole batch, where open_clip with ``local_loss`` returns that of its own rows; ``local_loss`` alone has
            an n×N block of its own on each process, computed in pieces, and returns that of its own rows too.
        cache_labels: keep what ``get_ground_truth`` returns; the loss itself needs no labels.
        rank, world_size: of this process and their number (0, which open_clip sets where nothing is distributed, means
            1); with more than one the default process group holds the
            batch, each process an equal number of rows.
        use_horovod: must be False.
        atp_weight: weight of the alignment of true pairs.
        cu_weight: weight of the centroid uniformity.
        uniformity_t: its sharpness.
        backend, group_mode: as for ``gapkernels.gap_loss``.

    Raises:
        ValueError: ``use_horovod``, or ``group_mode="ring"`` with ``local_loss`` alone, whose constants are gathered.
        RuntimeError: ``world_size`` is not that of ``torch.distributed``'s default process group.

    Examples:
        >>> image, text = torch.eye(4), torch.eye(4)
        >>> ClipLoss()(image, text, torch.tensor(100.0), output_dict=True)["contrastive_loss"].item() < 1e-6
        True
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        atp_weight: float | Tensor = 0.0,
        cu_weight: float | Tensor = 0.0,
        uniformity_t: float | Tensor = 2.0,
        backend: str = "auto",
        group_mode: str = "auto",
    ) -> None:
        nn.Module.__init__(self)  # open_clip's sets the same attributes, and versions differ in what they accept
        if use_horovod:
            raise ValueError("`use_horovod` must be False: processes communicate through torch.distributed")
        if group_mode == "ring" and local_loss and not gather_with_grad:
            raise ValueError(
                "`group_mode`='ring' and `local_loss`=True without `gather_with_grad` contradict: every process then "
                "compares its rows with gathered constants; add gather_with_grad=True (--gather-with-grad) or choose "
                "group_mode='gather'"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}
        self.atp_weight = atp_weight
        self.cu_weight = cu_weight
        self.uniformity_t = uniformity_t
        self.backend = backend
        self.group_mode = group_mode

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's positive in what ``get_logits`` returns.

        Args:
            device: where the labels are wanted.
            num_logits: number of rows.

        Returns:
            int64, ``[num_logits]``.
        """
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        labels = torch.arange(num_logits, device=device)
        if self.world_size > 1 and self.local_loss:
            labels += num_logits * self.rank
        if self.cache_labels:
            self.labels[device] = labels
            self.prev_num_logits = num_logits
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits themselves, for losses derived from this one; the forward pass does not make them.

        Args:
            image_features, text_features, logit_scale, logit_bias: as for the forward pass.

        Returns:
            Logits per image and per text: ``[N, N]`` each, with ``local_loss`` ``[n, N]``.
        """
        all_images, all_texts = self._gathered(image_features), self._gathered(text_features)
        if self.local_loss:
            per_image, per_text = image_features @ all_texts.T, text_features @ all_images.T
        else:
            per_image = all_images @ all_texts.T
            per_text = per_image.T
        if logit_bias is None:
            return logit_scale * per_image, logit_scale * per_text
        return logit_scale * per_image + logit_bias, logit_scale * per_text + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of the batch.

        Args:
            image_features: ``[n, D]``, normalised, any floating type; this process's rows.
            text_features: ``[n, D]``.
            logit_scale: a number or a 0-dim tensor, 1/temperature (the exponential already taken).
            logit_bias: a constant added to all logits, which no soft-max notices: its gradient is zero.
            output_dict: return the terms by name; their sum is the loss.

        Returns:
            The loss, 0-dim, or ``{"contrastive_loss": ...}`` with ``"align_true_pairs_loss"`` and
            ``"centroid_uniformity_loss"`` where they have a weight, each times its weight.
        """
        if not isinstance(logit_scale, Tensor) and math.isnan(logit_scale):
            logit_scale = torch.tensor(logit_scale, device=image_features.device)  # gives NaN, as NaN features do
        own_rows_only = self.world_size > 1 and self.local_loss and not self.gather_with_grad
        cu_weight = centroid_weight(self, self.cu_weight, len(image_features) * max(self.world_size, 1))
        scaled = not own_rows_only and not self.gather_with_grad
        terms = gap_loss(
            *(self._scale_gradient(x) if scaled else x for x in (image_features, text_features)),
            logit_scale=logit_scale,
            nce_weight=0.0 if own_rows_only else 1.0,
            atp_weight=self.atp_weight,
            cu_weight=cu_weight,
            uniformity_t=self.uniformity_t,
            normalize=False,
            backend=self.backend,
            group=self._group(),
            group_mode=self.group_mode,
            return_terms=True,
        )
        loss, info_nce, atp, cu = terms[:4]
        if own_rows_only:
            info_nce = self._info_nce_of_own_rows(image_features, text_features, logit_scale)
            loss = loss + info_nce
        assert info_nce is not None
        # DistributedDataParallel wants every parameter used.
        unused = None if logit_bias is None else 0 * logit_bias.sum()
        if not output_dict:
            return loss if unused is None else loss + unused
        losses = {"contrastive_loss": info_nce if unused is None else info_nce + unused}
        if atp is not None:
            losses["align_true_pairs_loss"] = self.atp_weight * atp
        if is_on(self.cu_weight):  # trainers expect the same names in every batch
            losses["centroid_uniformity_loss"] = torch.zeros_like(info_nce) if cu is None else self.cu_weight * cu
        return losses

    def _group(self) -> str | None:
        if self.world_size <= 1:
            return None
        actual = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if actual != self.world_size:
            raise RuntimeError(f"`world_size` is {self.world_size}, but torch.distributed runs {actual} process(es)")
        return "world"

    def _scale_gradient(self, features: Tensor) -> Tensor:
        if self.world_size <= 1:
            return features
        fixed = features.detach()
        return fixed + (features - fixed) / self.world_size  # the value itself, exactly

    def _gathered(self, features: Tensor) -> Tensor:
        """``[N, D]`` of all processes, with gradient where open_clip's has one."""
        if self.world_size <= 1:
            return features
        if self.gather_with_grad:
            from torch.distributed.nn.functional import all_gather  # fails to import where torch has no processes

            return torch.cat(all_gather(features))
        parts = [torch.empty_like(features) for _ in range(self.world_size)]
        dist.all_gather(parts, features.detach().contiguous())
        if not self.local_loss:
            parts[self.rank] = features
        return torch.cat(parts)

    def _info_nce_of_own_rows(self, image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
        """Cross-entropies of this process's rows, everyone's features being constants; a piece of the n×N at a time."""
        dtype = torch.promote_types(image.dtype, torch.float32)
        rows = len(image)
        labels = torch.arange(rows, device=image.device) + rows * self.rank
        pieces = range(0, rows, max(1, _LOGITS_AT_ONCE // (rows * self.world_size)))
        total = torch.zeros((), dtype=dtype, device=image.device)
        with torch.autocast(image.device.type, enabled=False):  # which would round the logits
            for own, other in ((image, text), (text, image)):
                columns = self._gathered(other).to(dtype)
                for start in pieces:
                    piece = slice(start, start + pieces.step)
                    total = total + checkpoint(
                        _sum_of_cross_entropies,
                        own[piece].to(dtype),
                        columns,
                        scale,
                        labels[piece],
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
        return total / (2 * rows)


def _sum_of_cross_entropies(rows: Tensor, columns: Tensor, scale: Tensor | float, labels: Tensor) -> Tensor:
    return cross_entropy(scale * rows @ columns.T, labels, reduction="sum")


def apply_to_open_clip(
    *,
    atp_weight: float | Tensor = 0.0,
    cu_weight: float | Tensor = 0.0,
    uniformity_t: float | Tensor = 2.0,
    backend: str = "auto",
    group_mode: str = "auto",
) -> None:
    """Let open_clip's loss, wherever its modules name it, be the class of this module from here on.

    ``open_clip.ClipLoss`` is a class then, derived from ``ClipLoss`` and from open_clip's own, with the options
    given here as defaults. open_clip's other losses (CoCa, distillation, SigLIP) stay what they are, also those that
    derive from its own; with a weight for a term that they do not have, making one is refused. A later call replaces
    an earlier one.

    Args:
        atp_weight, cu_weight, uniformity_t, backend, group_mode: as for ``ClipLoss``.

    Raises:
        RuntimeError: open_clip is not installed.
    """
    try:
        for name in ("open_clip", "open_clip.loss", "open_clip.factory"):
            importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"open_clip cannot be imported ({error}): {_INSTALL}") from error
    weights = {"atp_weight": atp_weight, "cu_weight": cu_weight}
    options = {**weights, "uniformity_t": uniformity_t, "backend": backend, "group_mode": group_mode}
    without_effect = ", ".join(f"{name}={weight}" for name, weight in weights.items() if is_on(weight))
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] in _PACKAGES]
    for name, original in list(_losses_of_open_clip()):
        if name == "ClipLoss":
            replacement = _with_defaults(original, options)
        else:
            replacement = _refusing(original, without_effect) if without_effect else original
        for module in modules:
            if isinstance(getattr(module, name, None), type):
                setattr(module, name, replacement)


patch = apply_to_open_clip

_PACKAGES = ("open_clip", "open_clip_train")


def _losses_of_open_clip() -> Iterator[tuple[str, type[nn.Module]]]:
    """Names and open_clip's own classes of its losses, whether or not they are replaced at present."""
    for name, present in vars(sys.modules["open_clip.loss"]).items():
        if name.endswith("Loss") and isinstance(present, type) and issubclass(present, nn.Module):
            yield name, present.__dict__.get("replaces", present)


def _with_defaults(original: type[nn.Module], options: dict[str, Any]) -> type[nn.Module]:
    bases = (ClipLoss,) if issubclass(ClipLoss, original) else (ClipLoss, original)

    class Applied(*bases):  # type: ignore[misc]
        replaces = original

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **{**options, **keywords})

        def __reduce_ex__(self, protocol: Any) -> Any:
            # By its name a process that has not replaced the loss would restore open_clip's, without the terms.
            return (_restored, (), self.__dict__) if type(self) is Applied else super().__reduce_ex__(protocol)

    Applied.__name__ = Applied.__qualname__ = ClipLoss.__name__
    Applied.__doc__ = ClipLoss.__doc__
    return Applied


def _restored() -> nn.Module:
    """A loss without its attributes, for copies and pickles: of the class that is in open_clip's place here."""
    present = getattr(sys.modules.get("open_clip.loss"), "ClipLoss", None)
    cls = present if isinstance(present, type) and "replaces" in present.__dict__ else ClipLoss
    return object.__new__(cls)


def _refusing(original: type[nn.Module], weights: str) -> type[nn.Module]:
    def refuse(self: nn.Module, *arguments: Any, **keywords: Any) -> None:
        raise WeightsWithoutEffectError(
            f"{weights}: open_clip's {original.__name__} has no such term, so the weights would do nothing; leave them "
            "out to train it as it is, or train ClipLoss (no CoCa model, no --siglip, no --distill-model)"
        )

    body: dict[str, Any] = {
        "__init__": refuse,
        "replaces": original,
        "__doc__": original.__doc__,
        "__module__": original.__module__,
    }
    return type(original.__name__, (original,), body)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``open_clip_train.main`` with this module's loss."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else ([], given)
    parser = argparse.ArgumentParser(
        prog="python -m gapkernels.integrations.open_clip",
        description="Run open_clip's trainer with the loss of gapkernels.",
        usage="%(prog)s [--atp-weight W] [--cu-weight W] [--uniformity-t T] [--backend NAME] [--group-mode MODE] -- "
        "OPEN_CLIP_OPTIONS",
    )
    parser.add_argument("--atp-weight", type=float, default=0.0, help="weight of the alignment of true pairs")
    parser.add_argument("--cu-weight", type=float, default=0.0, help="weight of the centroid uniformity")
    parser.add_argument("--uniformity-t", type=float, default=2.0, help="sharpness of the centroid uniformity")
    parser.add_argument("--backend", default="auto", help="as for gapkernels.gap_loss")
    parser.add_argument("--group-mode", choices=MODES, default="auto", help="as for gapkernels.gap_loss")
    if not own and not rest:
        own = ["--help"]
    apply_to_open_clip(**vars(parser.parse_args(own)))
    try:
        importlib.import_module("open_clip_train.main").main(rest)
    except WeightsWithoutEffectError as error:
        parser.error(str(error))


if __name__ == "__main__":
    # Run as a program this file is a second module, whose classes no pickle finds again.
    importlib.import_module("gapkernels.integrations.open_clip").main()
