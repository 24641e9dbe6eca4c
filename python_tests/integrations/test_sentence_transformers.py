"""The in-batch-negatives losses: values and gradients of their definition, and of the library where it is installed."""

import functools
import importlib.util
import itertools
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from oracle import DEVICE, random_embeddings

from gapkernels.integrations.sentence_transformers import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
)

library = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)


class Encoder(torch.nn.Module):
    """Maps features to embeddings as a SentenceTransformer does."""

    def __init__(self, width_in=12, width_out=8):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(width_in, width_out, device=DEVICE)

    def forward(self, features):
        return {"sentence_embedding": self.linear(features["inputs"])}


def columns(n=20):
    return [{"inputs": x.float().to(DEVICE)} for x in random_embeddings(n, 12)]


def definition(anchors, positives, scale, cosine=True):
    if cosine:
        anchors, positives = (torch.nn.functional.normalize(x, dim=1) for x in (anchors, positives))
    logits = scale * anchors @ positives.T
    target = torch.arange(len(logits), device=logits.device)
    return (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2


EVERYWHERE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def ranking_loss(columns, scale, directions, partition_mode, hardness_mode=None, strength=0.0, cosine=True):
    """The library's definition with all its options, over dense matrices."""
    if cosine:
        columns = [torch.nn.functional.normalize(x, dim=1) for x in columns]
    queries, *docs = columns
    everything, n = torch.cat(docs), len(queries)
    pair = torch.eye(n, dtype=torch.bool, device=queries.device)
    own = pair.repeat(1, len(docs))
    positive = torch.cat([pair, torch.zeros_like(own[:, n:])], dim=1)
    similarity = queries @ everything.T
    raised = {
        None: torch.zeros_like(own),
        "in_batch_negatives": ~own,
        "hard_negatives": own & ~positive,
        "all_negatives": ~positive,
    }[hardness_mode]
    logits = {
        "query_to_doc": scale * similarity + strength * raised * similarity.detach(),
        "query_to_query": (scale * queries @ queries.T).masked_fill(pair, -torch.inf),
        "doc_to_query": scale * docs[0] @ queries.T,
        "doc_to_doc": (scale * docs[0] @ everything.T).masked_fill(own, -torch.inf),
    }
    chosen = [logits[name] for name in directions]
    if partition_mode == "joint":
        log_partition = torch.cat(chosen, dim=1).logsumexp(dim=1)
    else:
        log_partition = sum(x.logsumexp(dim=1) for x in chosen) / len(chosen)
    return (log_partition - scale * (queries * docs[0]).sum(dim=1)).mean()


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_values_and_gradients_are_those_of_the_definition():
    model = Encoder()
    loss = MultipleNegativesSymmetricRankingLoss(model)(columns(), labels=None)
    exact = Encoder().double()
    embeddings = [exact({"inputs": c["inputs"].double()})["sentence_embedding"] for c in columns()]
    expected = definition(*embeddings, scale=20.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients(model, loss), gradients(exact, expected), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_the_other_terms_are_added_with_their_weights():
    anchors, positives = random_embeddings(20, 12)

    def value(**weights):
        loss = MultipleNegativesSymmetricRankingLoss(torch.nn.Identity(), **weights)
        return loss.compute_loss_from_embeddings([anchors.double(), positives.double()])

    x, y = (torch.nn.functional.normalize(e.double(), dim=1) for e in (anchors, positives))
    centroids = torch.nn.functional.normalize((x + y) / 2, dim=1)
    align = (x - y).square().sum(dim=1).mean()
    uniformity = torch.nn.functional.pdist(centroids).square().mul(-2).exp().mean().log()
    expected = definition(x, y, 20.0) + 0.5 * align + 0.25 * uniformity
    torch.testing.assert_close(value(atp_weight=0.5, cu_weight=0.25), expected)
    torch.testing.assert_close(value(), definition(x, y, 20.0))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="Scale must be a positive value, got `scale`=0"):
        MultipleNegativesSymmetricRankingLoss(Encoder(), scale=0)
    with pytest.raises(ValueError, match=r"`similarity_fct` must be None or .* got cdist"):
        MultipleNegativesSymmetricRankingLoss(Encoder(), similarity_fct=torch.cdist)
    with pytest.raises(ValueError, match=r"columns of anchors and positives, got 1 column"):
        MultipleNegativesRankingLoss(Encoder())([columns()[0]])

    for options, message in (
        ({"directions": ("doc_to_query",)}, r"'query_to_doc' among them, got \('doc_to_query',\)"),
        ({"directions": ("query_to_doc", "sideways")}, r"`directions` must be some of .*, got .*'sideways'"),
        ({"partition_mode": "both"}, "`partition_mode` must be one of .*, got 'both'"),
        (BOTH | {"directions": EVERYWHERE}, "`partition_mode`='per_direction' and `directions`=.* contradict"),
        ({"hardness_mode": "some"}, "`hardness_mode` must be one of .*, got 'some'"),
        ({"hardness_strength": -1.0}, "`hardness_strength` must not be negative, got -1.0"),
        (
            {
                "hardness_mode": "all_negatives",
                "hardness_strength": 1.0,
                "scale": torch.tensor(2.0, requires_grad=True),
            },
            "`hardness_mode`='all_negatives' and a `scale` that requires gradient contradict",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            MultipleNegativesRankingLoss(Encoder(), **options)


@pytest.mark.parametrize("hard_negatives", [0, 1, 2])
@pytest.mark.parametrize("hardness_mode", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
def test_every_option_has_the_value_and_the_gradients_of_its_definition(hardness_mode, hard_negatives):
    choices = [EVERYWHERE[:1], EVERYWHERE[:2], (EVERYWHERE[0], EVERYWHERE[3]), EVERYWHERE]
    modes = [*itertools.product(choices, ["joint"]), *((d, "per_direction") for d in (EVERYWHERE[:1], EVERYWHERE[::2]))]
    strength = 3.0 if hardness_mode else 0.0
    for (directions, mode), rows in itertools.product(modes, (1, 9)):
        made = [x.double().requires_grad_() for x in random_embeddings(rows, 6, 2 + hard_negatives)]
        loss = MultipleNegativesRankingLoss(torch.nn.Identity(), 7.0, None, False, directions, mode, hardness_mode)
        loss.hardness_strength = strength
        found = loss.compute_loss_from_embeddings(made)
        expected = ranking_loss(made, 7.0, directions, mode, hardness_mode, strength)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        ours, theirs = (torch.autograd.grad(value, made, allow_unused=True) for value in (found, expected))
        for a, b, x in zip(ours, theirs, made, strict=True):
            a, b = (torch.zeros_like(x) if grad is None else grad for grad in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_other_terms_beside_hard_negatives():
    made = [x.double() for x in random_embeddings(20, 12, 3)]
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), atp_weight=0.5)
    x, y = (torch.nn.functional.normalize(e, dim=1) for e in made[:2])
    expected = ranking_loss(made, 20.0, EVERYWHERE[:1], "joint") + 0.5 * (x - y).square().sum(dim=1).mean()
    torch.testing.assert_close(loss.compute_loss_from_embeddings(made), expected)
    assert loss.get_config_dict()["atp_weight"] == 0.5
    assert "cu_weight" not in loss.get_config_dict()


BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


@pytest.mark.parametrize("name", ["the class of two options", "the symmetric class"])
def test_options_are_read_at_every_call(name):
    model = torch.nn.Identity()
    symmetric = name == "the symmetric class"
    loss = MultipleNegativesSymmetricRankingLoss(model) if symmetric else MultipleNegativesRankingLoss(model, **BOTH)
    x, y = (e.double() for e in random_embeddings(20, 12))
    torch.testing.assert_close(loss.compute_loss_from_embeddings([x, y]), definition(x, y, 20.0))
    loss.scale = 50.0
    torch.testing.assert_close(loss.compute_loss_from_embeddings([x, y]), definition(x, y, 50.0))
    assert loss.temperature == 1 / 50
    loss.atp_weight = 0.5
    u, v = (torch.nn.functional.normalize(e, dim=1) for e in (x, y))
    expected = definition(x, y, 50.0) + 0.5 * (u - v).square().sum(dim=1).mean()
    torch.testing.assert_close(loss.compute_loss_from_embeddings([x, y]), expected)
    config = loss.get_config_dict()
    assert (config["scale"], config["atp_weight"], config["similarity_fct"]) == (50.0, 0.5, "cos_sim")
    loss.directions = ("doc_to_query",)
    with pytest.raises(ValueError, match="`directions` must be"):
        loss.compute_loss_from_embeddings([x, y])


def test_a_last_batch_of_one_pair():
    """InfoNCE is zero, as the library's is; the uniformity, over pairs of samples, does not exist."""
    x, y = (torch.nn.functional.normalize(e.double(), dim=1) for e in random_embeddings(1, 12))
    loss = MultipleNegativesSymmetricRankingLoss(torch.nn.Identity(), atp_weight=0.5, cu_weight=1.0)
    expected = 0.5 * (x - y).square().sum().item()
    with pytest.warns(UserWarning, match="one sample: the centroid uniformity") as caught:
        assert loss.compute_loss_from_embeddings([x, y]).item() == pytest.approx(expected)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss.compute_loss_from_embeddings([x, y]).item() == pytest.approx(expected)


def test_model_cards_find_the_paper_and_no_loss_inside_the_loss():
    loss = MultipleNegativesSymmetricRankingLoss(torch.nn.Identity())
    assert "Closing the Modality Gap Aligns Group-Wise Semantics" in loss.citation
    assert not hasattr(loss, "loss")  # the library tags a model card with it


def test_one_process_gathers_from_nobody_else():
    loss = MultipleNegativesSymmetricRankingLoss(Encoder(), gather_across_devices=True)
    torch.testing.assert_close(loss(columns()), MultipleNegativesSymmetricRankingLoss(Encoder())(columns()))


def worker(rank, size, mode, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    model = Encoder()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    own = [{"inputs": c["inputs"].chunk(size)[rank]} for c in columns()]
    for loss in (
        MultipleNegativesSymmetricRankingLoss(parallel, gather_across_devices=True, group_mode=mode),
        MultipleNegativesRankingLoss(parallel, gather_across_devices=True, directions=EVERYWHERE, group_mode=mode),
    ):
        model.zero_grad()
        three = [*own, {"inputs": -own[1]["inputs"].flip(1)}]
        value = loss(three if loss.partition_mode == "joint" else own)
        value.backward()
        results.put((loss.partition_mode, value.item(), [p.grad.numpy() for p in model.parameters()]))
    dist.barrier()
    dist.destroy_process_group()
    results.close()
    results.join_thread()
    # The wrapped model holds the last reference to gloo's group, whose end waits for a thread that may wait for Python.
    os._exit(0)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="gloo: the processes of this test are on the CPU")
@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_two_processes_train_on_the_batch_of_both(tmp_path, mode):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=worker, args=(rank, 2, mode, tmp_path / "store", results)) for rank in range(2)]
    for process in workers:
        process.start()
    found = [results.get(timeout=120) for _ in range(2 * len(workers))]
    for process in workers:
        process.join()
        assert process.exitcode == 0
    model = Encoder()
    embeddings = [model(c)["sentence_embedding"] for c in columns()]
    negatives = model({"inputs": -columns()[1]["inputs"].flip(1)})["sentence_embedding"]
    all_expected = {
        "per_direction": definition(*embeddings, scale=20.0),
        "joint": ranking_loss([*embeddings, negatives], 20.0, EVERYWHERE, "joint"),
    }
    for mode, value, of_parameters in found:
        assert value == pytest.approx(all_expected[mode].item(), rel=1e-5)
        expected = torch.autograd.grad(all_expected[mode], list(model.parameters()), retain_graph=True)
        for ours, theirs in zip(of_parameters, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-6)


@library
@pytest.mark.parametrize("name", ["cos_sim", "dot_score"])
def test_values_and_gradients_are_the_librarys(name):
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    embeddings = [e.double().requires_grad_() for e in random_embeddings(30, 8)]
    values = []
    for loss in (losses.MultipleNegativesSymmetricRankingLoss, MultipleNegativesSymmetricRankingLoss):
        value = loss(torch.nn.Identity(), scale=3.0, similarity_fct=getattr(util, name))
        values.append(value.compute_loss_from_embeddings(embeddings, None))
    torch.testing.assert_close(*values)
    ours, theirs = (torch.autograd.grad(value, embeddings) for value in values)
    torch.testing.assert_close(ours, theirs)


@library
def test_it_is_the_librarys_class_on_its_model_card():
    from sentence_transformers.base.model_card import get_losses
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        symmetric = MultipleNegativesSymmetricRankingLoss(torch.nn.Identity())
    assert isinstance(symmetric, losses.MultipleNegativesSymmetricRankingLoss)
    ours, theirs = (
        module.MultipleNegativesRankingLoss(torch.nn.Identity(), **BOTH)
        for module in (importlib.import_module("gapkernels.integrations.sentence_transformers"), losses)
    )
    assert isinstance(ours, losses.MultipleNegativesRankingLoss)
    assert theirs.get_config_dict().items() <= ours.get_config_dict().items()
    assert ours.citation.startswith(theirs.citation)
    card = SentenceTransformerModelCardData()
    card.set_losses(get_losses(ours))
    assert [tag for tag in card.tags if tag.startswith("loss:")] == ["loss:MultipleNegativesRankingLoss"]
    assert "2601.18525" in card.citations["MultipleNegativesRankingLoss"]


@library
def test_matryoshka_loss_around_it():
    from sentence_transformers.sentence_transformer import losses

    def trained(cls):
        model = Encoder()
        model.get_embedding_dimension = lambda: 8
        loss = losses.MatryoshkaLoss(model, cls(model, **BOTH), [8, 4])(columns(), None)
        return loss, *gradients(model, loss)

    torch.testing.assert_close(trained(MultipleNegativesRankingLoss), trained(losses.MultipleNegativesRankingLoss))


@library
@pytest.mark.parametrize("options", [{}, BOTH, {"directions": EVERYWHERE}])
def test_gradient_caching_is_the_plain_loss(options):
    from sentence_transformers.sentence_transformer import losses

    model = torch.nn.Sequential(Encoder())  # the library looks at its first module
    three = [*columns(), {"inputs": columns()[0]["inputs"].flip(1)}]
    plain = MultipleNegativesRankingLoss(model, atp_weight=0.5, **options)(three)
    cached = CachedMultipleNegativesRankingLoss(model, mini_batch_size=6, atp_weight=0.5, **options)
    assert isinstance(cached, losses.CachedMultipleNegativesRankingLoss)
    expected = gradients(model, plain)
    value = cached(three, None)
    value.backward()
    torch.testing.assert_close(value, plain)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    cached.scale = 5.0
    assert cached.get_config_dict()["scale"] == 5.0
    assert "2601.18525" in cached.citation


@library
def test_a_similarity_without_a_name_is_recognised():
    from sentence_transformers import util

    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), similarity_fct=functools.partial(util.cos_sim))
    assert loss.get_config_dict()["similarity_fct"] == "cos_sim"
    loss.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
    assert "CosineSimilarity" in loss.get_config_dict()["similarity_fct"]
    with pytest.raises(ValueError, match=r"got CosineSimilarity.*: only of inner products"):
        loss.compute_loss_from_embeddings(random_embeddings(4, 6))


@pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is not None, reason="it is installed")
def test_gradient_caching_needs_the_library():
    with pytest.raises(RuntimeError, match="pip install sentence-transformers"):
        CachedMultipleNegativesRankingLoss(Encoder())
