"""open_clip's contrastive loss, computed here, and its trainer running on it unchanged.

In a script:

    from gapkernels.integrations.open_clip import ClipLoss      # instead of: from open_clip.loss import ClipLoss

Under open_clip's own trainer, all of its options after the two dashes:

    torchrun --nproc-per-node 8 -m gapkernels.integrations.open_clip --atp-weight 1 --cu-weight 1 -- \\
        --model RN50 --train-data ... --batch-size 1024

Signature and behaviour: ``open_clip.loss.ClipLoss``, open_clip_torch 3.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gapkernels.functional import gap_loss

_INSTALL = "pip install open_clip_torch"


class ClipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.ClipLoss``: InfoNCE of the batch of all processes, in O(N·D) memory.

    Features are taken as they are: open_clip's models normalise them. With weights for the other two terms it is the
    paper's loss, under open_clip's trainer too, which adds up what the loss returns.

    Args:
        local_loss, gather_with_grad: how open_clip spreads the batch over processes. Here each tile is computed once
            in the whole world either way, and every process returns the loss of the whole batch (open_clip with
            ``local_loss`` returns that of its own rows). What the two decide is the scale of the gradient, as there:
            with ``gather_with_grad`` the mean over processes that DistributedDataParallel takes is the gradient of
            the loss, without it the gradient of the features is that divided by the number of processes.
        cache_labels: accepted, and not needed: there are no labels.
        rank, world_size: of this process and their number; with more than one the default process group holds the
            batch, each process an equal number of rows.
        use_horovod: must be False.
        atp_weight: weight of the alignment of true pairs.
        cu_weight: weight of the centroid uniformity.
        uniformity_t: its sharpness.
        backend: as for ``gapkernels.gap_loss``.

    Raises:
        ValueError: ``use_horovod``, or ``local_loss`` without ``gather_with_grad``, whose gradient leaves out the part
            that reaches the features through other processes' rows.
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
        atp_weight: float = 0.0,
        cu_weight: float = 0.0,
        uniformity_t: float = 2.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("`use_horovod` must be False: processes communicate through torch.distributed")
        if world_size > 1 and local_loss and not gather_with_grad:
            raise ValueError(
                "`local_loss` needs `gather_with_grad` (--local-loss --gather-with-grad): without it a part of the "
                "gradient is left out; this loss computes all of it"
            )
        self.gather_with_grad = gather_with_grad
        self.rank = rank
        self.world_size = world_size
        self.atp_weight = atp_weight
        self.cu_weight = cu_weight
        self.uniformity_t = uniformity_t
        self.backend = backend

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
        image_features, text_features = map(self._scale_gradient, (image_features, text_features))
        terms = gap_loss(
            image_features,
            text_features,
            logit_scale=logit_scale,
            atp_weight=self.atp_weight,
            cu_weight=self.cu_weight,
            uniformity_t=self.uniformity_t,
            normalize=False,
            backend=self.backend,
            group=self._group(),
            return_terms=True,
        )
        assert terms.info_nce is not None

        def using_bias(term: Tensor) -> Tensor:
            """DistributedDataParallel wants every parameter used."""
            return term if logit_bias is None else term + 0 * logit_bias.sum()

        if not output_dict:
            return using_bias(terms.loss)
        losses = {"contrastive_loss": using_bias(terms.info_nce)}
        if terms.align_true_pairs is not None:
            losses["align_true_pairs_loss"] = self.atp_weight * terms.align_true_pairs
        if terms.centroid_uniformity is not None:
            losses["centroid_uniformity_loss"] = self.cu_weight * terms.centroid_uniformity
        return losses

    def _group(self) -> torch.distributed.ProcessGroup | None:
        if self.world_size == 1:
            return None
        actual = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if actual != self.world_size:
            raise RuntimeError(f"`world_size` is {self.world_size}, but torch.distributed runs {actual} process(es)")
        return torch.distributed.group.WORLD

    def _scale_gradient(self, features: Tensor) -> Tensor:
        if self.world_size == 1 or self.gather_with_grad:
            return features
        fixed = features.detach()
        return fixed + (features - fixed) / self.world_size  # the value itself, exactly


def apply_to_open_clip(
    *, atp_weight: float = 0.0, cu_weight: float = 0.0, uniformity_t: float = 2.0, backend: str = "auto"
) -> None:
    """Let ``open_clip.create_loss`` and ``open_clip.ClipLoss`` give the loss of this module from here on.

    Losses derived from open_clip's own (CoCa, distillation) and SigLIP's stay what they are.

    Args:
        atp_weight, cu_weight, uniformity_t, backend: as for ``ClipLoss``.

    Raises:
        RuntimeError: open_clip is not installed.
    """
    try:
        modules = [importlib.import_module(name) for name in ("open_clip", "open_clip.loss", "open_clip.factory")]
    except ImportError as error:
        raise RuntimeError(f"open_clip cannot be imported ({error}): {_INSTALL}") from error
    replacement = functools.partial(
        ClipLoss, atp_weight=atp_weight, cu_weight=cu_weight, uniformity_t=uniformity_t, backend=backend
    )
    for module in modules:
        module.ClipLoss = replacement  # type: ignore[attr-defined]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``open_clip_train.main`` with this module's loss."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else ([], given)
    parser = argparse.ArgumentParser(
        prog="python -m gapkernels.integrations.open_clip",
        description="Run open_clip's trainer with the loss of gapkernels.",
        usage="%(prog)s [--atp-weight W] [--cu-weight W] [--uniformity-t T] [--backend NAME] -- OPEN_CLIP_OPTIONS",
    )
    parser.add_argument("--atp-weight", type=float, default=0.0, help="weight of the alignment of true pairs")
    parser.add_argument("--cu-weight", type=float, default=0.0, help="weight of the centroid uniformity")
    parser.add_argument("--uniformity-t", type=float, default=2.0, help="sharpness of the centroid uniformity")
    parser.add_argument("--backend", default="auto", help="as for gapkernels.gap_loss")
    if not own and not rest:
        own = ["--help"]
    apply_to_open_clip(**vars(parser.parse_args(own)))
    importlib.import_module("open_clip_train.main").main(rest)


if __name__ == "__main__":
    main()
