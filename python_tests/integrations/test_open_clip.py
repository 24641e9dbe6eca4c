"""open_clip's loss: its values and gradients, in every way it spreads a batch over processes."""

import itertools
import os
import socket
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.multiprocessing as mp
from oracle import random_embeddings

from gapkernels import gap_loss
from gapkernels.integrations import open_clip
from gapkernels.integrations.open_clip import ClipLoss

cross_entropy = torch.nn.functional.cross_entropy


def unit_embeddings(rows):
    return [torch.nn.functional.normalize(e, dim=1) for e in random_embeddings(rows, 6, dtype=torch.float64)]


def as_open_clip_does(image, text, scale, local_loss=False, gather_with_grad=False):
    """The loss by its definition: gather, multiply, cross-entropy."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    everywhere = [image, text]
    if size > 1 and gather_with_grad:
        everywhere = [torch.cat(torch.distributed.nn.all_gather(x)) for x in everywhere]
    elif size > 1:
        for k, x in enumerate(everywhere):
            parts = [torch.empty_like(x) for _ in range(size)]
            dist.all_gather(parts, x.detach())
            parts[rank] = x
            everywhere[k] = torch.cat(parts)
    all_image, all_text = everywhere
    target = torch.arange(len(all_image))
    if local_loss:
        target = target[rank * len(image) : (rank + 1) * len(image)]
        return (
            cross_entropy(scale * image @ all_text.T, target) + cross_entropy(scale * text @ all_image.T, target)
        ) / 2
    logits = scale * all_image @ all_text.T
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def differentiate(function, image, text):
    leaves = [x.clone().requires_grad_() for x in (image, text, torch.tensor(9.0, dtype=torch.float64))]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def test_one_process():
    image, text = unit_embeddings(17)
    for ours, expected in zip(
        differentiate(ClipLoss(cache_labels=True), image, text),
        differentiate(as_open_clip_does, image, text),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def _in_each_process(rank, size, port, rows):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        image, text = (x[rank * rows : (rank + 1) * rows] for x in unit_embeddings(size * rows))
        for local_loss, gather_with_grad in ((False, False), (False, True), (True, True)):
            how = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
            ours = differentiate(ClipLoss(**how, rank=rank, world_size=size), image, text)
            expected = differentiate(lambda *x, how=how: as_open_clip_does(*x, **how), image, text)
            if local_loss:  # of its own rows: the mean is the loss, and the gradient of the scale likewise
                for x in (expected[0], expected[3]):
                    dist.all_reduce(x)
                    x /= size
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, how=how: f"{how}: {m}")
        with pytest.raises(RuntimeError, match=f"`world_size` is 7, but torch.distributed runs {size} process"):
            ClipLoss(world_size=7)(image, text, 9.0)
    finally:
        dist.destroy_process_group()


def test_several_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_in_each_process, args=(2, port, 5), nprocs=2)


def test_the_terms_of_the_paper_add_up():
    image, text = unit_embeddings(12)
    loss = ClipLoss(atp_weight=0.5, cu_weight=2.0, uniformity_t=1.5)
    losses = loss(image, text, 9.0, output_dict=True)
    assert list(losses) == ["contrastive_loss", "align_true_pairs_loss", "centroid_uniformity_loss"]
    expected = gap_loss(image, text, logit_scale=9.0, atp_weight=0.5, cu_weight=2.0, uniformity_t=1.5)
    torch.testing.assert_close(sum(losses.values()), expected)
    torch.testing.assert_close(loss(image, text, 9.0), expected)
    assert list(ClipLoss()(image, text, 9.0, output_dict=True)) == ["contrastive_loss"]


def test_a_bias_of_the_logits_changes_nothing_and_counts_as_used():
    image, text = unit_embeddings(12)
    bias = torch.tensor(-10.0, requires_grad=True)
    loss = ClipLoss()(image, text, 9.0, logit_bias=bias)
    loss_without = ClipLoss()(image, text, 9.0)
    loss.backward()
    assert loss.item() == loss_without.item()
    assert bias.grad == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_horovod": True}, "`use_horovod` must be False"),
        ({"world_size": 2, "local_loss": True}, "`local_loss` needs `gather_with_grad`"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClipLoss(**options)


@pytest.fixture
def pretended(monkeypatch):
    """Modules with the places of open_clip that know the loss, and its trainer's entry point."""
    names = ("open_clip", "open_clip.loss", "open_clip.factory", "open_clip_train", "open_clip_train.main")
    modules = {name: types.ModuleType(name) for name in names}
    for module in itertools.islice(modules.values(), 3):
        module.ClipLoss = None
    modules["open_clip_train.main"].main = lambda arguments: modules.update(arguments=arguments)
    for name, module in list(modules.items()):
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def test_the_trainer_runs_on_this_loss(pretended):
    open_clip.main(["--atp-weight", "1", "--cu-weight", "0.5", "--", "--model", "RN50", "--precision", "amp"])
    assert pretended["arguments"] == ["--model", "RN50", "--precision", "amp"]
    for name in ("open_clip", "open_clip.loss", "open_clip.factory"):
        made = pretended[name].ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
        assert isinstance(made, ClipLoss)
        assert (made.atp_weight, made.cu_weight) == (1.0, 0.5)


def test_without_open_clip_the_message_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(RuntimeError, match="pip install open_clip_torch"):
        open_clip.apply_to_open_clip()
