"""open_clip's loss: its values and gradients, in every way it spreads a batch over processes."""

import copy
import importlib.util
import os
import pickle
import socket
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.multiprocessing as mp
from oracle import random_embeddings

from gapkernels import gap_loss
from gapkernels.integrations import open_clip
from gapkernels.integrations.open_clip import ClipLoss

cross_entropy = torch.nn.functional.cross_entropy
library = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
LOSSES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "GenLipLoss")


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
            if not local_loss:
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


class FromLogits(ClipLoss):
    """A loss derived from the drop-in as users derive theirs from open_clip's."""

    def forward(self, image_features, text_features, logit_scale):
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale)
        labels = self.get_ground_truth(image_features.device, len(per_image))
        return (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2


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
        open_clip._LOGITS_AT_ONCE = 2 * size * rows  # two rows at a time, one is left
        for local_loss, gather_with_grad in ((False, False), (False, True), (True, False), (True, True)):
            how = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
            here = {"rank": rank, "world_size": size}
            ours = differentiate(ClipLoss(**how, **here), image, text)
            derived = differentiate(FromLogits(**how, **here, cache_labels=True), image, text)
            expected = differentiate(lambda *x, how=how: as_open_clip_does(*x, **how), image, text)
            for a, b in zip(derived, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, how=how: f"logits, {how}: {m}")
            if gather_with_grad or not local_loss:
                around = differentiate(ClipLoss(**how, **here, group_mode="ring"), image, text)
                for a, b in zip(around, ours, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
            if local_loss and gather_with_grad:  # of its own rows: the mean is the loss, and the scale's gradient too
                for x in (expected[0], expected[3]):
                    dist.all_reduce(x)
                    x /= size
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, how=how: f"{how}: {m}")
        weights = {"atp_weight": 0.5, "cu_weight": 2.0}
        parts = [
            differentiate(loss, image, text)
            for loss in (
                ClipLoss(local_loss=True, **here, **weights),
                ClipLoss(local_loss=True, **here),
                lambda x, y, scale: (
                    gap_loss(x, y, nce_weight=0.0, normalize=False, group="world", **weights) + 0 * scale
                ),
            )
        ]
        for whole, nce, rest in zip(*parts, strict=True):
            torch.testing.assert_close(whole, nce + rest, rtol=1e-9, atol=1e-11)
        with pytest.raises(ValueError, match="must hold the same number of rows, got 4 to 5"):
            ClipLoss(local_loss=True, **here)(image[rank:], text[rank:], 9.0)
        with pytest.raises(RuntimeError, match=f"`world_size` is 7, but torch.distributed runs {size} process"):
            ClipLoss(world_size=7)(image, text, 9.0)
    finally:
        dist.destroy_process_group()


def test_several_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_in_each_process, args=(2, port, 5), nprocs=2)


def test_no_processes_at_all_are_one():
    """open_clip's tasks and arguments say 0 where nothing is distributed."""
    image, text = unit_embeddings(7)
    losses = [ClipLoss(world_size=size, cu_weight=1.0)(image, text, 9.0) for size in (0, 1)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


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


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="`use_horovod` must be False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="`group_mode`='ring' and `local_loss`=True without `gather_with_grad`"):
        ClipLoss(local_loss=True, group_mode="ring")


def test_a_loss_derived_from_the_drop_in():
    image, text = unit_embeddings(17)
    for ours, expected in zip(
        differentiate(FromLogits(), image, text), differentiate(as_open_clip_does, image, text), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    per_image, per_text = ClipLoss().get_logits(image, text, 9.0, logit_bias=torch.tensor(-10.0))
    torch.testing.assert_close(per_image, 9.0 * image @ text.T - 10)
    torch.testing.assert_close(per_text, per_image.T)


def test_labels_are_kept_where_asked_for():
    loss = ClipLoss(cache_labels=True, local_loss=True, rank=2, world_size=3)
    labels = loss.get_ground_truth(torch.device("cpu"), 4)
    assert labels.tolist() == [8, 9, 10, 11]
    assert loss.get_ground_truth(torch.device("cpu"), 4) is labels is loss.labels[torch.device("cpu")]
    assert loss.prev_num_logits == 4
    assert loss.get_ground_truth(torch.device("cpu"), 2).tolist() == [4, 5]
    loss = ClipLoss()
    assert loss.get_ground_truth(torch.device("cpu"), 3).tolist() == [0, 1, 2]
    assert (loss.labels, loss.prev_num_logits) == ({}, 0)


@pytest.mark.parametrize("scale", [float("nan"), torch.tensor(float("nan"))])
def test_a_scale_that_is_not_a_number_gives_none(scale):
    image, text = (x.requires_grad_() for x in unit_embeddings(5))
    loss = ClipLoss(atp_weight=1.0)(image, text, scale)
    loss.backward()
    assert loss.isnan()
    assert image.grad.isnan().all()


def test_a_last_batch_of_one_sample():
    """InfoNCE is zero, as open_clip's is; the uniformity, over pairs of samples, does not exist."""
    image, text = unit_embeddings(1)
    loss = ClipLoss(atp_weight=0.5, cu_weight=2.0)
    with pytest.warns(UserWarning, match="one sample: the centroid uniformity") as caught:
        losses = loss(image, text, 9.0, output_dict=True)
    assert len(caught) == 1
    distance = (image - text).square().sum().item()
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {"contrastive_loss": 0.0, "align_true_pairs_loss": 0.5 * distance, "centroid_uniformity_loss": 0.0}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(image, text, 9.0).item() == pytest.approx(0.5 * distance)
        assert ClipLoss()(image, text, 9.0).item() == 0


@pytest.fixture
def pretended(monkeypatch):
    """Modules with the places of open_clip that know its losses, and its trainer's entry point."""
    theirs = type("ClipLoss", (torch.nn.Module,), {"__init__": lambda self, **_: torch.nn.Module.__init__(self)})
    losses = {"ClipLoss": theirs, "CoCaLoss": type("CoCaLoss", (theirs,), {"forward": lambda self: "CoCa"})}
    losses["SigLipLoss"] = type("SigLipLoss", (torch.nn.Module,), {"forward": lambda self: "SigLIP"})
    modules = {}
    for name in ("open_clip", "open_clip.loss", "open_clip.factory", "open_clip_train", "open_clip_train.main"):
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(losses if name.startswith("open_clip.") or name == "open_clip" else {})
        monkeypatch.setitem(sys.modules, name, modules[name])
    modules["open_clip_train.main"].main = lambda arguments: modules.update(arguments=arguments)
    modules["theirs"] = types.SimpleNamespace(**losses)
    return modules


def test_the_trainer_runs_on_this_loss(pretended):
    open_clip.main(["--atp-weight", "1", "--cu-weight", "0.5", "--", "--model", "RN50", "--precision", "amp"])
    assert pretended["arguments"] == ["--model", "RN50", "--precision", "amp"]
    for name in ("open_clip", "open_clip.loss", "open_clip.factory"):
        made = pretended[name].ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
        assert isinstance(made, ClipLoss)
        assert (made.atp_weight, made.cu_weight) == (1.0, 0.5)
        assert made.cache_labels


def test_what_takes_the_place_of_the_class_is_a_class(pretended):
    theirs = pretended["theirs"]
    open_clip.patch(atp_weight=1.0)
    patched = pretended["open_clip"].ClipLoss
    assert issubclass(patched, theirs.ClipLoss)
    assert issubclass(patched, ClipLoss)
    assert isinstance(patched(), pretended["open_clip.loss"].ClipLoss)
    mine = type("Mine", (patched,), {})(atp_weight=3.0, cu_weight=0.5)
    assert (mine.atp_weight, mine.cu_weight) == (3.0, 0.5)
    image, text = unit_embeddings(7)
    expected = gap_loss(image, text, logit_scale=9.0, atp_weight=1.0, cu_weight=0.0)
    for made in (patched(), copy.deepcopy(patched()), pickle.loads(pickle.dumps(patched(cache_labels=True)))):
        assert type(made) is patched
        torch.testing.assert_close(made(image, text, 9.0), expected)
    open_clip.patch()  # a later call replaces an earlier one
    again = pretended["open_clip.factory"].ClipLoss
    assert again.__bases__ == (ClipLoss, theirs.ClipLoss)
    assert again().atp_weight == 0


def test_a_pickle_keeps_its_terms_where_nothing_was_replaced(pretended, monkeypatch):
    open_clip.patch(atp_weight=1.0)
    pickled = pickle.dumps(pretended["open_clip"].ClipLoss())
    monkeypatch.setattr(pretended["open_clip.loss"], "ClipLoss", pretended["theirs"].ClipLoss)
    restored = pickle.loads(pickled)
    assert type(restored) is ClipLoss
    assert restored.atp_weight == 1.0


def test_weights_that_would_do_nothing_are_refused(pretended, capsys):
    theirs = pretended["theirs"]
    open_clip.patch(cu_weight=0.5)
    for name in ("CoCaLoss", "SigLipLoss"):
        place = getattr(pretended["open_clip"], name)
        assert issubclass(place, getattr(theirs, name))
        with pytest.raises(
            open_clip.WeightsWithoutEffectError, match=rf"cu_weight=0.5: open_clip's {name} has no such"
        ):
            place()
    pretended["open_clip_train.main"].main = lambda arguments: pretended["open_clip.factory"].CoCaLoss()
    with pytest.raises(SystemExit) as stopped:
        open_clip.main(["--atp-weight", "1", "--", "--model", "coca_ViT-B-32"])
    assert stopped.value.code == 2
    assert "error: atp_weight=1.0: open_clip's CoCaLoss has no such term" in capsys.readouterr().err
    open_clip.patch()
    for name, says in (("CoCaLoss", "CoCa"), ("SigLipLoss", "SigLIP")):
        assert getattr(pretended["open_clip.loss"], name) is getattr(theirs, name)
        assert getattr(pretended["open_clip.loss"], name)()() == says


def test_without_open_clip_the_message_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(RuntimeError, match="pip install open_clip_torch"):
        open_clip.apply_to_open_clip()


def test_a_library_that_cannot_be_imported_is_warned_of(tmp_path, monkeypatch):
    from gapkernels.integrations._shared import replaced_class

    (tmp_path / "broken_library.py").write_text("raise RuntimeError('operator is missing')")
    (tmp_path / "library_wanting_more.py").write_text("import package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=r"installed but cannot be imported \(RuntimeError: operator is missing\)"):
        assert replaced_class("broken_library", "ClipLoss") is torch.nn.Module
    with pytest.warns(UserWarning, match="No module named 'package_that_is_not_there'"):
        assert replaced_class("library_wanting_more", "ClipLoss") is torch.nn.Module
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replaced_class("library_that_is_not_there.loss", "ClipLoss") is torch.nn.Module
        assert replaced_class("torch.nn", "CrossEntropyLoss") is torch.nn.CrossEntropyLoss
        assert replaced_class("torch.nn", "NoLossOfThisName") is torch.nn.Module


@pytest.fixture
def installed():
    """open_clip itself; its losses are put back after the test."""
    import open_clip as theirs
    import open_clip.factory

    kept = [
        (module, name, getattr(module, name))
        for module in (theirs, theirs.loss, theirs.factory)
        for name in LOSSES
        if hasattr(module, name)
    ]
    yield theirs
    for module, name, cls in kept:
        setattr(module, name, cls)


@library
def test_values_and_gradients_are_open_clips_own(installed):
    image, text = unit_embeddings(17)
    assert issubclass(ClipLoss, installed.loss.ClipLoss)
    for ours, expected in zip(
        differentiate(ClipLoss(), image, text), differentiate(installed.loss.ClipLoss(), image, text), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    missing = set(vars(installed.loss.ClipLoss())) - set(vars(ClipLoss()))
    assert not missing


@library
def test_open_clips_other_losses_go_on_when_its_own_is_replaced(installed):
    image, text = (x.float() for x in unit_embeddings(6))
    names = {name: getattr(installed.loss, name) for name in LOSSES if hasattr(installed.loss, name)}
    logits, captions = torch.randn(6, 5, 11), torch.randint(1, 11, (6, 5))

    def values():
        coca = installed.loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        distillation = installed.loss.DistillClipLoss()
        return [
            *coca(image, text, logits, captions, torch.tensor(9.0)),
            *distillation(image, text, torch.tensor(9.0), text, image, torch.tensor(5.0)),
        ]

    before = values()
    open_clip.patch()
    assert isinstance(installed.ClipLoss(), names["ClipLoss"])
    torch.testing.assert_close(values(), before, rtol=0, atol=0)
    open_clip.patch(atp_weight=1.0)
    for name in set(names) - {"ClipLoss"}:
        with pytest.raises(open_clip.WeightsWithoutEffectError, match="atp_weight=1"):
            getattr(installed.loss, name)()


@library
def test_open_clips_factory_makes_this_loss(installed):
    open_clip.patch(atp_weight=1.0, cu_weight=0.5)
    arguments = types.SimpleNamespace(
        distill=False, model="RN50", siglip=False, local_loss=True, gather_with_grad=True, rank=0, world_size=1,
        horovod=False, torchcompile=False,
    )  # fmt: skip
    made = installed.create_loss(arguments)
    assert isinstance(made, ClipLoss)
    assert (made.local_loss, made.cu_weight) == (True, 0.5)
