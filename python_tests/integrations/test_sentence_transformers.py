"""The in-batch-negatives loss: values and gradients of its definition, and the library's own where it is installed."""

import importlib.util
import warnings

import pytest
import torch
import torch.distributed as dist
from oracle import DEVICE, random_embeddings

from gapkernels.integrations.sentence_transformers import (
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
    with pytest.raises(ValueError, match="`scale` must be positive, got 0"):
        MultipleNegativesSymmetricRankingLoss(Encoder(), scale=0)
    with pytest.raises(ValueError, match=r"`similarity_fct` must be None or .* got cdist"):
        MultipleNegativesSymmetricRankingLoss(Encoder(), similarity_fct=torch.cdist)
    with pytest.raises(ValueError, match="two columns, anchors and positives, got 3"):
        MultipleNegativesSymmetricRankingLoss(Encoder())([*columns(), columns()[0]])

    for options, message in (
        (
            {},
            r"`directions` must be .* got \('query_to_doc',\) and 'joint'; train .*losses.MultipleNegativesRankingLoss",
        ),
        (BOTH | {"partition_mode": "joint"}, r"got \('query_to_doc', 'doc_to_query'\) and 'joint'"),
        (BOTH | {"hardness_mode": "all_negatives"}, "`hardness_mode` must be None, got 'all_negatives'"),
    ):
        with pytest.raises(ValueError, match=message):
            MultipleNegativesRankingLoss(Encoder(), **options)


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
    loss.directions = ("query_to_doc",)
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


def worker(rank, size, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    model = Encoder()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    own = [{"inputs": c["inputs"].chunk(size)[rank]} for c in columns()]
    loss = MultipleNegativesSymmetricRankingLoss(parallel, gather_across_devices=True)(own)
    loss.backward()
    results.put((loss.item(), [p.grad.numpy() for p in model.parameters()]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="gloo: the processes of this test are on the CPU")
def test_two_processes_train_on_the_batch_of_both(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=worker, args=(rank, 2, tmp_path / "store", results)) for rank in range(2)]
    for process in workers:
        process.start()
    found = [results.get(timeout=120) for _ in workers]
    for process in workers:
        process.join()
        assert process.exitcode == 0
    model = Encoder()
    embeddings = [model(c)["sentence_embedding"] for c in columns()]
    expected = definition(*embeddings, scale=20.0)
    expected_gradients = gradients(model, expected)
    for value, of_parameters in found:
        assert value == pytest.approx(expected.item(), rel=1e-5)
        for ours, theirs in zip(of_parameters, expected_gradients, strict=True):
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
