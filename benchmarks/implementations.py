"""Who is measured: our backends and their peers, each as a function from embeddings to the loss.

A peer is one entry of ``IMPLEMENTATIONS``, and nothing elsewhere: tables of cases take it by its group, result
files its label and version, `make gpu-wheels` its package. All of them normalise the rows themselves, so that everybody
starts from the same raw embeddings. Third-party packages are imported when they are first used, and one that is missing
or cannot run on the device says so.

python -m benchmarks.implementations     prints the peers' packages, for pip
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import gapkernels
from benchmarks import options
from benchmarks.cases import COMPILED, GAP, INFO_NCE, LIBRARIES, OPTION_LOSSES, OURS, Case, option_of
from benchmarks.oracle import UNIFORMITY_T
from benchmarks.workload import Loss
from gapkernels.backends import NAMES, available

LOGIT_SCALE = 1 / 0.07


class Unavailable(Exception):
    """An implementation cannot run a case; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """Something to measure.

    Args:
        label: for tables and plots.
        losses: what it can compute.
        build: makes the function for a case; raises ``Unavailable``.
        group: which it belongs to in the tables of cases; "" for one that they name.
        module: Python package that it imports; "" for none.
        package: what pip installs for that, "inf-cl==1.2.1".
        carried: whether its package is a wheel, which a machine without a network can be given.
        cuda_only: whether it needs an NVIDIA GPU.
        two_modalities: whether it is limited to two.
        note: how what it computes differs; "" if it does not.
        exact: whether it computes the loss of the case, so that its error can be measured.
        operations: multiple of N²D for forward and backward, where that differs from the case's own count.
        backend: which of ours it is; "" for a peer.
        compiled: whether the first call of every shape compiles; that time is not measured.
    """

    label: str
    losses: frozenset[str]
    build: Callable[[Case], Loss]
    group: str = ""
    module: str = ""
    package: str = ""
    carried: bool = True
    cuda_only: bool = False
    two_modalities: bool = False
    note: str = ""
    exact: bool = True
    operations: int | None = None
    backend: str = ""
    compiled: bool = False

    def function(self, case: Case, device: torch.device) -> Loss:
        """The function that computes a case.

        Raises:
            Unavailable: says why it cannot.
        """
        if case.loss not in self.losses:
            raise Unavailable(f"does not compute the {case.loss} loss")
        if self.two_modalities and case.modalities != 2:
            raise Unavailable(f"takes two modalities, not {case.modalities}")
        if self.module and importlib.util.find_spec(self.module) is None:
            raise Unavailable(f"not installed: pip install {self.package}")
        for status in available():
            if status.name == self.backend and not status.usable:
                raise Unavailable(status.reason)
        if self.cuda_only and device.type != "cuda":
            raise Unavailable("needs an NVIDIA GPU")
        if self.operations is not None and not case.backward:
            raise Unavailable("computes its gradients in the forward pass")
        with device:
            return self.build(case)


# An interpreter runs them on a CPU too, for tests; its speed means nothing.
GPU_BACKENDS = frozenset({"triton", "cuda"})


KEEP_VARIABLE = "GAPKERNELS_BENCH_KEEP"
"""``all`` or ``none`` of the similarities kept by our losses, instead of what fits into their default budget."""


# ---- ours -----------------------------------------------------------------------------------------------------------


def _ours(backend: str) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        if option_of(case.loss):
            return options.ours(case, backend, LOGIT_SCALE)
        function = gapkernels.gap_loss if case.loss == GAP else gapkernels.info_nce
        chosen = os.environ.get(KEEP_VARIABLE)
        if not chosen:
            return lambda z: function(*z, logit_scale=LOGIT_SCALE, backend=backend)
        keep = {"all": True, "none": False}[chosen]
        weights = {} if case.loss == GAP else {"atp_weight": 0.0, "cu_weight": 0.0}
        return lambda z: gapkernels.gap_loss(
            *z, logit_scale=LOGIT_SCALE, backend=backend, keep_similarities=keep, **weights
        )

    return build


def our_backends(device: torch.device) -> list[str]:
    """Names of our implementations that a device can run, the newest first: time may run out."""
    usable = [status.name for status in reversed(available()) if status.usable and status.name != "reference"]
    others = {"cpu"} if device.type == "cuda" else GPU_BACKENDS
    return [f"gapkernels-{name}" for name in usable if name not in others]


def groups(device: torch.device) -> dict[str, list[str]]:
    """Names of implementations by group; ours are those that the device can run."""
    named = [(name, entry.group) for name, entry in IMPLEMENTATIONS.items()]
    peers = {group: [name for name, own in named if own == group] for group in (COMPILED, LIBRARIES)}
    return {OURS: our_backends(device), **peers}


# ---- the authors' formulation, and the same through matrix products --------------------------------------------------


def dense_cross_entropy(rows: Tensor, cols: Tensor) -> Tensor:
    """InfoNCE both ways, from a dense matrix of logits."""
    logits = LOGIT_SCALE * rows @ cols.T
    target = torch.arange(len(rows), device=rows.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pairwise_distance_gap_loss(z: Sequence[Tensor]) -> Tensor:
    """The loss as the paper's authors compute it: distances of true pairs, and every distance of two centroids.

    torch has no `pdist` for 16-bit types; as under autocast, it gets float32 there.

    Source: arXiv 2601.18525, equations of the two terms.
    """
    anchor, *others = [F.normalize(e, dim=1) for e in z]
    nce = torch.stack([dense_cross_entropy(m, anchor) for m in others]).mean()
    atp = torch.stack([(m - anchor).norm(dim=1).pow(2).mean() for m in others]).mean()
    centroid = F.normalize(torch.stack([anchor, *others]).mean(dim=0), dim=1)
    cu = (
        torch.pdist(centroid.to(torch.promote_types(centroid.dtype, torch.float32)))
        .pow(2)
        .mul(-UNIFORMITY_T)
        .exp()
        .mean()
        .log()
    )
    return nce + atp + cu


def dense_info_nce(z: Sequence[Tensor]) -> Tensor:
    anchor, *others = [F.normalize(e, dim=1) for e in z]
    return torch.stack([dense_cross_entropy(m, anchor) for m in others]).mean()


def matmul_info_nce(z: Sequence[Tensor]) -> Tensor:
    """InfoNCE from one matrix of logits whose rows and columns are both reduced: friendlier to a compiler."""
    anchor, *others = [F.normalize(e, dim=1) for e in z]
    total = anchor.new_zeros((), dtype=torch.float32)
    for m in others:
        logits = (LOGIT_SCALE * m @ anchor.T).float()
        total = total + (logits.logsumexp(dim=1) + logits.logsumexp(dim=0)).mean() / 2 - logits.diagonal().mean()
    return total / len(others)


def matmul_gap_loss(z: Sequence[Tensor]) -> Tensor:
    """The same loss with every distance written as an inner product: ‖x − y‖² = 2 − 2⟨x, y⟩ for unit vectors."""
    anchor, *others = [F.normalize(e, dim=1) for e in z]
    atp = torch.stack([2 - 2 * (m * anchor).sum(dim=1).float().mean() for m in others]).mean()
    centroid = F.normalize(torch.stack([anchor, *others]).mean(dim=0), dim=1)
    potential = torch.exp(2 * UNIFORMITY_T * ((centroid @ centroid.T).float() - 1))
    count = len(centroid)
    cu = torch.log((potential.sum() - potential.diagonal().sum()) / (count * (count - 1)))
    return matmul_info_nce(z) + atp + cu


def _dense(gap: Loss, info_nce: Loss, mode: str | None = None) -> Callable[[Case], Loss]:
    """Functions of the dense matrices, compiled in a mode of torch.compile if one is given."""

    def build(case: Case) -> Loss:
        function = gap if case.loss == GAP else info_nce
        if mode is None:
            return function
        torch._dynamo.reset()  # else the shapes compiled so far count, and after a few of them it runs eagerly
        return torch.compile(function, dynamic=False, mode=mode)

    return build


# ---- libraries ------------------------------------------------------------------------------------------------------


def _open_clip(case: Case) -> Loss:
    loss = _open_clip_loss_module().ClipLoss()
    return lambda z: loss(F.normalize(z[0], dim=1), F.normalize(z[1], dim=1), LOGIT_SCALE)


def _open_clip_loss_module() -> ModuleType:
    """open_clip's own loss file. ``import open_clip`` would want torchvision, which the loss does not use."""
    name = "open_clip.loss"
    if name not in sys.modules:
        package = importlib.util.find_spec("open_clip")
        assert package is not None
        assert package.origin is not None
        spec = importlib.util.spec_from_file_location("_open_clip_loss", Path(package.origin).with_name("loss.py"))
        if spec is None or spec.loader is None:
            raise Unavailable("this version of open_clip has no loss.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return sys.modules[name]


def _inf_cl(case: Case) -> Loss:
    from inf_cl import cal_flash_loss

    if case.width > 256 and case.width % 256:
        raise Unavailable(f"cuts embeddings into heads of 256, which does not divide {case.width}")
    head = min(case.width, 256)

    def loss(z: Sequence[Tensor]) -> Tensor:
        x, y = (F.normalize(e, dim=1) for e in z)
        one_way = cal_flash_loss(x, y, scale=LOGIT_SCALE, head_dim=head)
        return (one_way.mean() + cal_flash_loss(y, x, scale=LOGIT_SCALE, head_dim=head).mean()) / 2

    return loss


def _siglip(case: Case) -> Loss:
    from siglip_kernel import fused_siglip_loss

    def loss(z: Sequence[Tensor]) -> Tensor:
        x, y = (F.normalize(e, dim=1) for e in z)
        log_scale = torch.full((), math.log(10), device=x.device, requires_grad=True)
        bias = torch.full((), -10.0, device=x.device, requires_grad=True)
        return fused_siglip_loss(x, y, log_scale, bias)

    return loss


def _metric_learning(case: Case) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    one_way = NTXentLoss(temperature=1 / LOGIT_SCALE)

    def loss(z: Sequence[Tensor]) -> Tensor:
        x, y = z
        labels = torch.arange(len(x), device=x.device)
        # A copy: given the same object twice, the library takes both sides for one and leaves out its diagonal.
        ref_labels = labels.clone()
        forth = one_way(x, labels, ref_emb=y, ref_labels=ref_labels)
        return (forth + one_way(y, labels, ref_emb=x, ref_labels=ref_labels)) / 2

    return loss


def _keops(case: Case) -> Loss:
    from pykeops.torch import LazyTensor

    if case.dtype == "bfloat16":
        raise Unavailable("does not take bfloat16")

    def logits(rows: Tensor, cols: Tensor, scale: float) -> LazyTensor:
        """[N, N], never stored: KeOps reduces it by a kernel that it writes for the formula."""
        return (LazyTensor(rows[:, None, :]) | LazyTensor(cols[None, :, :])) * scale

    def loss(z: Sequence[Tensor]) -> Tensor:
        anchor, *others = [F.normalize(e, dim=1) for e in z]
        total = anchor.new_zeros(())
        for m in others:
            pair = logits(m, anchor, LOGIT_SCALE)
            positive = LOGIT_SCALE * (m * anchor).sum(dim=1).mean()
            total = total + (pair.logsumexp(dim=1) + pair.logsumexp(dim=0)).mean() / 2 - positive
            if case.loss == GAP:
                total = total + (m - anchor).square().sum(dim=1).mean()
        total = total / len(others)
        if case.loss == GAP:
            centroid = F.normalize(torch.stack([anchor, *others]).mean(dim=0), dim=1)
            scale = 2 * UNIFORMITY_T
            potential = (logits(centroid, centroid, scale) - scale).exp().sum(dim=1).sum() - len(centroid)
            total = total + torch.log(potential / (len(centroid) * (len(centroid) - 1)))
        return total

    return loss


_BOTH = frozenset({GAP, INFO_NCE})
_NCE = frozenset({INFO_NCE})
_OPTIONS = frozenset(OPTION_LOSSES)

IMPLEMENTATIONS: dict[str, Implementation] = {
    **{
        f"gapkernels-{name}": Implementation(
            f"gapkernels ({name})",
            _BOTH | _OPTIONS,
            _ours(name),
            group=OURS,
            cuda_only=name in GPU_BACKENDS,
            backend=name,
        )
        for name in NAMES
        if name != "reference"
    },
    "authors": Implementation("authors' formulation", _BOTH, _dense(pairwise_distance_gap_loss, dense_info_nce)),
    "authors-compile": Implementation(
        "authors' formulation, torch.compile",
        _BOTH,
        _dense(pairwise_distance_gap_loss, dense_info_nce, "default"),
        compiled=True,
    ),
    "matmul": Implementation("matmul form", _BOTH, _dense(matmul_gap_loss, matmul_info_nce)),
    "matmul-compile": Implementation(
        "matmul form, torch.compile",
        _BOTH,
        _dense(matmul_gap_loss, matmul_info_nce, "default"),
        group=COMPILED,
        compiled=True,
    ),
    "matmul-max-autotune": Implementation(
        "matmul form, torch.compile (max-autotune)",
        _BOTH,
        _dense(matmul_gap_loss, matmul_info_nce, "max-autotune"),
        group=COMPILED,
        compiled=True,
    ),
    "dense": Implementation("dense form", _OPTIONS, lambda case: options.dense(case, LOGIT_SCALE), two_modalities=True),
    "open-clip": Implementation(
        "open_clip ClipLoss",
        _NCE,
        _open_clip,
        group=LIBRARIES,
        module="open_clip",
        package="open_clip_torch==3.3.0",
        two_modalities=True,
    ),
    "inf-cl": Implementation(
        "Inf-CL",
        _NCE,
        _inf_cl,
        group=LIBRARIES,
        module="inf_cl",
        package="inf-cl==1.2.1",
        cuda_only=True,
        two_modalities=True,
    ),
    "siglip-kernel": Implementation(
        "siglip-kernel",
        _NCE,
        _siglip,
        group=LIBRARIES,
        module="siglip_kernel",
        package="siglip-kernel==0.1.2",
        cuda_only=True,
        two_modalities=True,
        note="sigmoid loss instead of InfoNCE: no soft-max sums, 6N²D operations",
        exact=False,
        operations=6,
    ),
    "pytorch-metric-learning": Implementation(
        "pytorch-metric-learning NTXentLoss",
        _NCE,
        _metric_learning,
        group=LIBRARIES,
        module="pytorch_metric_learning",
        package="pytorch-metric-learning==2.9.0",
        two_modalities=True,
    ),
    "keops": Implementation(
        "KeOps",
        _BOTH,
        _keops,
        group=LIBRARIES,
        module="pykeops",
        package="pykeops==2.3",
        carried=False,  # comes as source, and compiles its kernels with the machine's compilers
        compiled=True,
    ),
}


def _main() -> None:
    print(*(entry.package for entry in IMPLEMENTATIONS.values() if entry.package and entry.carried))


if __name__ == "__main__":
    _main()
