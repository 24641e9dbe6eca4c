"""The in-batch-negatives loss: values and gradients of its definition, and the library's own where it is installed."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from oracle import DEVICE, random_embeddings

from gapkernels.integrations.sentence_transformers import MultipleNegativesSymmetricRankingLoss

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
