"""Retrieval against ranks counted on the full similarity matrix in float64."""

import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gapkernels.metrics import DirectionResult, _inputs, retrieval, uniformity

TIE = 1e-12
KS = (1, 2, 5, 10, 100)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_inputs, "TILE", 64)  # so that the sizes below have several tiles, and ragged ones
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products only wait for each other, above all when tests run in parallel
    yield
    torch.set_num_threads(threads)


def randn(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Two noisy views of the same samples, so that recalls lie well inside (0, 1)."""
    meaning = randn(n, d, 0)
    return (meaning + 0.8 * randn(n, d, 1)).to(dtype), (meaning + 0.8 * randn(n, d, 2)).to(dtype)


def direct(query: torch.Tensor, target: torch.Tensor, query_ids: Sequence, target_ids: Sequence) -> DirectionResult:
    score = (F.normalize(query.double(), dim=1) @ F.normalize(target.double(), dim=1).T).numpy()
    ranks = []
    for row, query_id in zip(score, query_ids, strict=True):
        right = np.array([target_id == query_id for target_id in target_ids])
        ranks.append(1 + int((row[~right] >= row[right].max() - TIE).sum()))
    recall = {k: float(np.mean([rank <= k for rank in ranks])) for k in KS}
    return DirectionResult(recall, float(np.median(ranks)), float(np.mean(ranks)))


def check(query: torch.Tensor, target: torch.Tensor, ids_of_query: Sequence, ids_of_target: Sequence, **ids) -> None:
    result = retrieval(query, target, ks=KS, **ids)
    assert result.query_to_target == direct(query, target, ids_of_query, ids_of_target)
    assert result.target_to_query == direct(target, query, ids_of_target, ids_of_query)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (3, 8), (64, 16), (65, 16), (300, 6), (257, 40)])
def test_pairs_without_ids(n: int, d: int, dtype: torch.dtype) -> None:
    query, target = pair(n, d, dtype)
    check(query, target, range(n), range(n))


def test_the_random_cases_are_neither_trivial_nor_symmetric() -> None:
    forward, backward = retrieval(*pair(300, 6), ks=KS)
    assert 0.05 < forward.recall[1] < forward.recall[5] < 0.95
    assert forward != backward


@pytest.mark.parametrize("classes", [1, 3, 40, 299])
def test_repeated_ids(classes: int) -> None:
    query, target = pair(300, 6)
    ids = torch.randint(classes, (300,), generator=torch.Generator().manual_seed(3))
    check(query, target, ids.tolist(), ids.tolist(), ids=ids)


def test_five_captions_per_image() -> None:
    image, _ = pair(70, 6)
    caption = image.repeat_interleave(5, dim=0) + 0.8 * randn(350, 6, 5)
    order = torch.randperm(350, generator=torch.Generator().manual_seed(4))
    image_ids, caption_ids = torch.arange(70), torch.arange(70).repeat_interleave(5)[order]
    check(
        caption[order],
        image,
        caption_ids.tolist(),
        image_ids.tolist(),
        query_ids=caption_ids,
        target_ids=image_ids,
    )
    check(
        image,
        caption[order],
        image_ids.tolist(),
        caption_ids.tolist(),
        query_ids=image_ids,
        target_ids=caption_ids,
    )


@pytest.mark.skipif(importlib.util.find_spec("open_clip_train") is None, reason="open_clip is not installed")
def test_recalls_are_open_clips_own() -> None:
    """Its evaluation knows one caption per image; of five each is looked for among the same images."""
    try:
        from open_clip_train.metrics import get_clip_metrics
    except ImportError:
        from open_clip_train.train import get_clip_metrics
    image = F.normalize(randn(70, 6, 0, torch.float64), dim=1)
    caption = F.normalize(image.repeat_interleave(5, dim=0) + 0.8 * randn(350, 6, 5, torch.float64), dim=1)
    ids = torch.arange(70).repeat_interleave(5)
    found = retrieval(caption, image, query_ids=ids, target_ids=torch.arange(70), ks=(1, 5, 10))
    theirs = [get_clip_metrics(image, caption[number::5], torch.tensor(1.0)) for number in range(5)]
    for k, recall in found.query_to_target.recall.items():
        assert recall == pytest.approx(np.mean([metrics[f"text_to_image_R@{k}"] for metrics in theirs]))
    assert found.query_to_target.mean_rank == pytest.approx(np.mean([m["text_to_image_mean_rank"] for m in theirs]))
    one = retrieval(image, caption[::5], ks=(1, 5, 10)).query_to_target
    for k, recall in one.recall.items():
        assert recall == pytest.approx(theirs[0][f"image_to_text_R@{k}"])


def test_ids_of_every_kind_mean_the_same() -> None:
    query, target = pair(150, 6)
    numbers = [(7 * row) % 40 for row in range(150)]
    words = [f"class {number}" for number in numbers]
    expected = retrieval(query, target, ids=torch.tensor(numbers))
    for ids in (
        numbers,
        words,
        np.array(numbers, dtype=np.uint8),
        np.array(words, dtype=object),
        torch.tensor(numbers, dtype=torch.int32),
    ):
        assert retrieval(query, target, ids=ids) == expected
        assert retrieval(query, target, query_ids=ids, target_ids=ids) == expected


def test_large_ids_of_mixed_signedness_stay_apart() -> None:
    # As float64, the common type of int64 and uint64, the two ids would be equal and both queries right.
    big = 2**60
    x = torch.eye(2)
    ids = np.array([big, big + 1])
    result = retrieval(x, x.flip(0), query_ids=ids.astype(np.int64), target_ids=ids.astype(np.uint64), ks=(1,))
    assert result.query_to_target.recall == {1: 0.0}


def test_a_repeated_class_text_is_right_for_its_class_only() -> None:
    text = torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    image = torch.eye(3)[[0, 0, 1, 2, 2, 2]]  # the fourth image looks like the third class
    labels = ["a", "a", "b", "b", "c", "c"]
    result = retrieval(image, text, ids=labels, ks=(1, 2, 3))
    # Its two wrong texts score 1, its right texts 0: rank 1 + 2 + 2 ties of class "a" at 0.
    assert result.query_to_target.recall == {1: 5 / 6, 2: 5 / 6, 3: 5 / 6}
    assert result.query_to_target.mean_rank == pytest.approx((5 + 5) / 6)


@pytest.mark.parametrize("n", [2, 64, 65, 130])
@pytest.mark.parametrize("d", [3, 64, 100])
def test_collapsed_embeddings_come_last(n: int, d: int) -> None:
    x = randn(1, d, 0).expand(n, d) * torch.linspace(0.3, 7, n)[:, None]
    for direction in retrieval(x, x, ks=(1, n - 1, n)):
        assert direction == DirectionResult({1: 0.0, n - 1: 0.0, n: 1.0}, n, n)


def test_zero_rows_are_tied_with_everything() -> None:
    x = torch.eye(5)
    zero = x.clone()
    zero[2] = 0
    result = retrieval(zero, x, ks=(1, 4, 5))
    assert result.query_to_target.recall == {1: 0.8, 4: 0.8, 5: 1.0}


@pytest.mark.parametrize("n", [66, 129])
def test_duplicates_tie_wherever_they_lie(n: int) -> None:
    """A copy of the right target in another (ragged) tile counts against the query, by rank 2 and not 1."""
    query = randn(n, 50, 0)
    target = query.clone()
    target[-1] = target[0]
    result = retrieval(query, target, ks=(1, 2)).query_to_target
    assert result.recall[1] == pytest.approx((n - 2) / n)
    check(query, target, range(n), range(n))


def test_differences_beyond_float32_products_count() -> None:
    """The better of two targets wins by 2e-10, which a float32 (or TF32, or bf16) product would not show."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0.0], [1.0, 2e-5]], dtype=torch.float64)
    assert retrieval(query, target, ks=(1,)).query_to_target.recall == {1: 1.0}


def test_global_precision_switches_do_not_matter() -> None:
    query, target = pair(300, 64)
    target = query + 1e-3 * target
    expected = retrieval(query, target, ks=KS), uniformity(query, t=30.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (retrieval(query, target, ks=KS), uniformity(query, t=30.0)) == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_strides_and_gradients_do_not_matter() -> None:
    query, target = pair(130, 6)
    strided = torch.empty(130, 12)[:, ::2].copy_(query).requires_grad_()
    assert retrieval(strided, target.T.contiguous().T) == retrieval(query, target)


def test_the_order_of_rows_does_not_matter() -> None:
    query, target = pair(200, 6)
    ids = torch.arange(200) % 37
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    expected = retrieval(query, target, ids=ids)
    assert retrieval(query[order], target[order], ids=ids[order]) == expected


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_tensor_is_larger_than_the_inputs_or_a_tile() -> None:
    query, target = pair(400, 6)
    ids = torch.arange(400) % 40
    with LargestTensor() as seen:
        retrieval(query, target)
        retrieval(query, target, ids=ids)
        uniformity(query)
    assert seen.elements == 64 * 64  # the inputs have 400·6 elements, all similarities 400·400


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_at_twenty_thousand_rows() -> None:
    """An N×N matrix takes 400 MB in booleans and 3.2 GB in float64; the tiles take a few times 8 MiB."""
    script = """
import re, torch
from gapkernels.metrics import retrieval, uniformity

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024

torch.set_num_threads(1)
torch.manual_seed(0)
query, target = torch.randn(20000, 64), torch.randn(20000, 64)
retrieval(query[:3000], target[:3000]); uniformity(query[:3000])
before = peak()
retrieval(query, target); uniformity(query)
print(peak() - before)
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(output) < 150


def test_errors() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(
        ValueError, match=r"`target` must have as many rows as `query`, 4, unless .* got shape \[5, 3\]"
    ):
        retrieval(x, torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"`target` must have the shape of `query`, \[4, 3\], got shape \[4, 2\]"):
        retrieval(x, torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"`target` must have as many columns as `query`, 3, got shape \[5, 2\]"):
        retrieval(x, torch.ones(5, 2), query_ids=[0] * 4, target_ids=[0] * 5)
    with pytest.raises(ValueError, match=r"`query` must be \[N, D\] .* got shape \[3\]"):
        retrieval(torch.ones(3), x)
    with pytest.raises(ValueError, match=r"`target` must be \[N, D\] .* got shape \[0, 3\]"):
        retrieval(x, torch.ones(0, 3))
    with pytest.raises(TypeError, match=r"`query` must be a floating point tensor \[N, D\], got dtype torch.int32"):
        retrieval(x.int(), x)
    for ids in ({}, {"query_ids": range(4), "target_ids": range(4)}):
        with pytest.raises(ValueError, match=r"`target` must be on the device of `query`, cpu, got meta"):
            retrieval(x, torch.ones(4, 3, device="meta"), **ids)
    spoilt = x.clone()
    spoilt[3, 0] = math.nan
    with pytest.raises(ValueError, match=r"`query` must be finite, got NaN in row 3"):
        retrieval(spoilt, x)
    with pytest.raises(ValueError, match=r"`target` must be finite, got NaN in row 3"):
        retrieval(x, spoilt)


def test_errors_of_ids() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"`ids` must have 4 entries, one per row, got shape \[3\]"):
        retrieval(x, x, ids=[1, 2, 3])
    with pytest.raises(ValueError, match=r"`target_ids` must have 4 entries, one per row, got shape \[4, 1\]"):
        retrieval(x, x, query_ids=range(4), target_ids=torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"`ids` must hold integers or strings, got dtype float64"):
        retrieval(x, x, ids=[0.0, 1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match=r"`ids` must hold integers or strings, got dtype torch.bfloat16"):
        retrieval(x, x, ids=torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"must be given together, got `query_ids` without `target_ids`"):
        retrieval(x, x, query_ids=range(4))
    with pytest.raises(ValueError, match=r"must be given together, got `target_ids` without `query_ids`"):
        retrieval(x, x, target_ids=range(4))
    with pytest.raises(ValueError, match=r"`ids` holds for both sides, got it together with"):
        retrieval(x, x, ids=range(4), query_ids=range(4), target_ids=range(4))
    with pytest.raises(
        TypeError, match=r"`target_ids` must hold the same kind of values as `query_ids`, int64, got <U1"
    ):
        retrieval(x, x, query_ids=[0, 1, 2, 3], target_ids=["0", "1", "2", "3"])
    with pytest.raises(
        ValueError, match=r"`query_ids` must hold ids that `target_ids` .* 2 without .* first 'c' in row 2"
    ):
        retrieval(x, x, query_ids=["a", "b", "c", "d"], target_ids=["a", "b", "a", "b"])
    with pytest.raises(
        ValueError, match=r"`target_ids` must hold ids that `query_ids` .* 1 without .* first 9 in row 1"
    ):
        retrieval(x, x, query_ids=[0, 1, 2, 2], target_ids=[0, 9, 1, 2])


@pytest.mark.parametrize(
    ("ks", "error", "message"),
    [
        ((), ValueError, r"`ks` must hold at least one depth, got none"),
        ((1, 0), ValueError, r"`ks` must be an integer >= 1, got 0"),
        ((2.5,), TypeError, r"`ks` must be an integer >= 1, got 2.5"),
    ],
)
def test_errors_of_depths(ks: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        retrieval(torch.ones(4, 3), torch.ones(4, 3), ks=ks)
