"""Cases for the Triton kernels that are run in its interpreter; see ``test_triton_interpreted.py``."""

import itertools

import pytest
import torch
from backends import interpreter
from contrast_cases import CASES
from oracle import TOLERANCE, Tolerance, assert_matches_oracle, random_embeddings, trained_embeddings
from test_contrast import compare

from gapkernels import backends, gap_loss, similarity_logsumexp, similarity_softplus
from gapkernels.backends.contract import Matrix
from gapkernels.backends.triton import backend as triton_backend
from gapkernels.backends.triton import gradient_blocks, gradient_tiles, steps, tuning
from gapkernels.backends.triton.device import INTERPRETED
from gapkernels.backends.triton.products import add_products
from gapkernels.backends.triton.tile_sums import tile_sums

torch.set_num_threads(1)
interpreter.hasten()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on infinities that are meant


def test_values_are_interpreted():
    assert INTERPRETED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "dim", "scale"),
    [(2, 1, 14.3), (3, 7, 100.0), (33, 64, 1.0), (65, 100, 14.3), (127, 33, 100.0), (129, 16, 1.0), (40, 513, 14.3)],
)
def test_values(n, dim, scale, dtype):
    assert_matches_oracle(random_embeddings(n, dim, dtype=dtype), scale, "triton")


@pytest.mark.parametrize(("rows", "cols", "symmetric"), [(40, 33, False), (33, 40, False), (70, 70, True)])
def test_values_of_sums(rows, cols, symmetric):
    """Before a sum that is missing would be taken for one out of range, and be computed again."""
    x, y = (torch.nn.functional.normalize(torch.randn(n, 32), dim=1) for n in (rows, cols))
    y = x if symmetric else y
    scale = torch.tensor(3.0)
    row_factor, col_factor = (torch.full((n,), 0.0 if symmetric else 1.0) for n in (rows, cols))
    matrix = Matrix(x, row_factor, y, col_factor, scale, biased=symmetric, symmetric=symmetric)
    sums = [s[0].double() for s in tile_sums([matrix], None, 100)]
    entries = torch.exp(3.0 * x.double() @ y.double().T).fill_diagonal_(0)
    if symmetric:
        torch.testing.assert_close(sums[0], entries.sum(dim=1), rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(sums, [entries.sum(dim=1), entries.sum(dim=0)], rtol=1e-5, atol=0)


@pytest.mark.parametrize("pairs", ["anchor", "all"])
@pytest.mark.parametrize(("modalities", "anchor"), [(2, 1), (3, 1)])
def test_values_for_modalities_and_options(modalities, anchor, pairs):
    for normalize, normalize_centroids in itertools.product([True, False], repeat=2):
        assert_matches_oracle(
            [e if normalize else e / 4 for e in random_embeddings(35, 20, modalities)],
            9.0,
            "triton",
            anchor=anchor,
            pairs=pairs,
            normalize=normalize,
            normalize_centroids=normalize_centroids,
            uniformity_t=1.5,
        )


@pytest.mark.parametrize("weights", [w for w in itertools.product([0.0, 0.7], repeat=3) if any(w)], ids=str)
def test_values_for_weights(weights):
    nce, atp, cu = weights
    assert_matches_oracle(random_embeddings(20, 12, 3), 14.3, "triton", nce_weight=nce, atp_weight=atp, cu_weight=cu)


def test_values_for_strides():
    x, y = random_embeddings(33, 20)
    views = [x.T.contiguous().T, torch.stack([y, y], dim=2)[:, :, 1]]
    assert_matches_oracle(views, 14.3, "triton")
    assert_matches_oracle([x[:1].expand(33, 20), y[:, 3:13].repeat(1, 2)[:, ::1]], 14.3, "triton")


def test_values_of_centroids_in_float16(monkeypatch):
    """More centroids than are kept in float32; the rounding must not show in the loss."""
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Config(128, 128, 128, 4, 1))
    assert_matches_oracle(random_embeddings(300, 256, dtype=torch.float16), 14.3, "triton")


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)), ids=str)
def test_values_of_gradients_where_needed(needed):
    inputs = [*random_embeddings(40, 12), torch.tensor(7.0)]

    def gradients(flags):
        leaves = [v.clone().requires_grad_(flag) for v, flag in zip(inputs, flags, strict=True)]
        loss = gap_loss(*leaves[:2], logit_scale=leaves[2], backend="triton")
        if any(flags):
            loss.backward()
        return [leaf.grad for leaf in leaves]

    for part, full, flag in zip(gradients(needed), gradients((True,) * 3), needed, strict=True):
        if flag:
            torch.testing.assert_close(part, full)
        else:
            assert part is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["collapsed", "poles", "duplicates", "zeros", "norms"])
def test_degenerate(kind, dtype):
    x, y = random_embeddings(50, 16)
    if kind == "collapsed":
        x = y = x[:1].repeat(50, 1)
    elif kind == "poles":
        x, y = x[:1] + 0.01 * x, -x[:1] + 0.01 * y
    elif kind == "duplicates":
        x, y = x[torch.arange(50) // 5], y[torch.arange(50) // 5]
    elif kind == "zeros":
        x[3], y[3], y[7] = 0, 0, 0
    elif kind == "norms":
        x[1] *= 1e-10 if dtype == torch.float32 else 1e-3
        x[2] *= 1e18 if dtype == torch.float32 else 1e3
        y[2] *= 1e30 if dtype == torch.float32 else 1e3
    if kind == "zeros" and dtype == torch.float16:
        pytest.skip("the true gradient of a row of zeros is 1e12 and more: no float16")
    # Float32 exponents of size s are rounded to s·2^-24, and the gradient of collapsed rows is a difference of such.
    tolerance = TOLERANCE[dtype]
    if kind == "collapsed":
        tolerance = tolerance._replace(gradient=3 * tolerance.gradient)
    assert_matches_oracle([x.to(dtype), y.to(dtype)], 5.0, "triton", tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_degenerate_numbers_are_not_hidden(bad):
    x, y = random_embeddings(30, 8)
    x[4, 2] = bad
    x.requires_grad_()
    loss = gap_loss(x, y, backend="triton")
    loss.backward()
    assert not torch.isfinite(loss)
    assert not torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scale", [100.0, 1000.0, 20000.0])
def test_range_of_sums_left_below(scale):
    """All cosines of some rows are near −1: the constant exponent loses them, the running maximum must not."""
    x, y = random_embeddings(60, 8)
    x, y = x[:1] + 0.04 * x, -x[:1] + 0.04 * y
    tolerance = Tolerance(*(max(t, 4 * scale * torch.finfo(torch.float32).eps) for t in TOLERANCE[torch.float32]))
    assert_matches_oracle([x, y], scale, "triton", tolerance)


def test_range_needs_the_running_maximum(monkeypatch):
    """The test above is about something: without it the logarithms would be those of zero."""
    from gapkernels.backends.triton import log_sums

    x, y = random_embeddings(60, 8)
    x, y = x[:1] + 0.01 * x, -x[:1] + 0.01 * y
    monkeypatch.setattr(log_sums, "SMALLEST_EXACT_SUM", 0.0)
    with torch.no_grad():
        wrong = gap_loss(x, y, logit_scale=1000.0, backend="triton", atp_weight=0.0, cu_weight=0.0)
    assert not torch.isfinite(wrong) or wrong.item() < 1


@pytest.mark.parametrize("t", [0.01, 50.0, 500.0])
def test_range_of_uniformity(t):
    tolerance = Tolerance(max(1e-5, t * 1e-6), max(1e-5, t * 1e-6))
    assert_matches_oracle(random_embeddings(70, 24, 3), 1.0, "triton", tolerance, nce_weight=0.0, uniformity_t=t)


def assert_log_sums_may_be_far_apart(n=40):
    x, y = random_embeddings(n, 8)
    half = n // 2
    x[:half], y[:half] = x[:1] + 0.01 * x[:half], -x[:1] + 0.01 * y[:half]
    assert_matches_oracle([x, y], 400.0, "triton", Tolerance(1e-4, 4e-4))


def test_range_of_log_sums_within_one_tile():
    """Log sums of one tile that are further apart than one exponential per entry can serve."""
    assert_log_sums_may_be_far_apart()


def test_deterministic_mode_agrees_and_repeats():
    x, y = (e.requires_grad_() for e in random_embeddings(130, 24))

    def run():
        return torch.autograd.grad(gap_loss(x, y, backend="triton"), (x, y))

    usual = run()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
        assert_matches_oracle([x.detach(), y.detach()], 14.3, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first, usual)


@pytest.mark.parametrize(("block", "dtype"), [(32, torch.float32), (48, torch.float16)], ids=str)
def test_blocks_of_gradients(monkeypatch, block, dtype):
    """More rows than one block of gradients holds: partial blocks, diagonals, modalities with rows and columns."""
    monkeypatch.setenv(gradient_blocks.VARIABLE, str(block))
    assert_matches_oracle(random_embeddings(97, 20, 3, dtype=dtype), 14.3, "triton", pairs="all")
    assert_matches_oracle(random_embeddings(97, 20, 2, dtype=dtype), 14.3, "triton")


@pytest.mark.parametrize(
    "config",
    [
        tuning.Config(16, 16, 16, 4, 1, group=1),
        tuning.Config(16, 32, 16, 4, 1, group=4),
        tuning.Config(32, 16, 16, 4, 1, group=3, programs_per_processor=3),
        tuning.Config(32, 32, 32, 4, 1, group=2, tma=True),
        tuning.Config(32, 32, 32, 4, 1, group=2, tma=True, programs_per_processor=3),
    ],
    ids=str,
)
def test_tiles_of_every_shape(monkeypatch, config):
    """Orders of tiles over rectangles and triangles, each entry once; descriptors instead of pointers."""
    monkeypatch.setattr(tuning, "INTERPRETER", config)
    for n in (5, 32, 65):  # up to five tiles each way, more than a group
        assert_matches_oracle(random_embeddings(n, 40), 14.3, "triton")


def distributed_evaluations(size, backend, mine=lambda e: e, **options):
    """``(loss, gradients, gradient of the scale)``: in range of the constant exponent, and with every sum below it."""
    spread = random_embeddings(9 * size, 12, 3)
    x, y, z = spread
    poles = [x[:1] + x / 50, -x[:1] + y / 50, -x[:1] + z / 50]
    for scale_value, embeddings, cu_weight in ((9.0, spread, 1.0), (300.0, poles, 0.0)):
        scale = torch.tensor(scale_value, requires_grad=True)
        leaves = [mine(e).clone().requires_grad_() for e in embeddings]
        more = {"cu_weight": cu_weight, "pairs": "all" if cu_weight else "anchor", **options}
        loss = gap_loss(*leaves, logit_scale=scale, backend=backend, **more)
        loss.backward()
        yield loss.item(), [e.grad for e in leaves], scale.grad.item()


def distributed_worker(rank, size, file, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    own = slice(9 * rank, 9 * rank + 9)
    group = torch.distributed.group.WORLD
    evaluations = distributed_evaluations(size, "triton", lambda e: e[own], group=group)
    for case, (loss, gradients, scale_gradient) in enumerate(evaluations):
        results.put((case, rank, loss, [(g / size).numpy() for g in gradients], scale_gradient))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_distributed(size, tmp_path):
    """Every process returns the loss of the whole batch; the gradients are those of one process."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=distributed_worker, args=(rank, size, tmp_path / "store", results))
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    found = sorted((results.get(timeout=300) for _ in range(2 * size)), key=lambda result: result[:2])
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    exact = distributed_evaluations(size, "torch")
    # Exponents of size 300 are rounded to 300·2^-24.
    for by_rank, (loss, gradients, scale_gradient), rounding in zip(
        (found[:size], found[size:]), exact, (1.0, 30.0), strict=True
    ):
        for m, gradient in enumerate(gradients):
            ours = torch.cat([torch.from_numpy(result[3][m]) for result in by_rank])
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6 * rounding)
        for _, _, value, _, own_scale_gradient in by_rank:
            assert abs(value - loss) < 1e-6 * rounding  # the sum of terms of size one, which cancel
            assert abs(own_scale_gradient - scale_gradient) < 1e-5


@pytest.mark.parametrize(
    ("rows", "cols", "dim", "dtype", "copy_engine"),
    [
        (1, 1, 16, torch.float16, False),
        (1, 1, 16, torch.float32, True),
        (33, 70, 48, torch.float32, False),
        (33, 70, 48, torch.float16, True),
        (128, 65, 80, torch.float16, False),
        (128, 65, 80, torch.float32, True),
        (97, 128, 144, torch.float32, False),
        (97, 128, 144, torch.float16, True),
    ],
    ids=str,
)
def test_both_products_in_one_launch(monkeypatch, rows, cols, dim, dtype, copy_engine):
    """Added to what is there, or put in its place; either one alone; the room of H past its edges does not count."""
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.INTERPRETER._replace(tile_n=128, group=2, tma=copy_engine))
    generator = torch.Generator().manual_seed(0)
    h = torch.full((rows + 64, cols + 96 - cols % 32), torch.nan, dtype=dtype)[:rows, :cols]
    h.copy_(torch.rand(rows, cols, generator=generator))
    y, x = (torch.randn(side, dim, generator=generator).to(dtype) for side in (cols, rows))
    products = h.double() @ y.double(), h.double().T @ x.double()
    for first, first_cols, with_rows, with_cols in itertools.product([True, False], repeat=4):
        sides = ((first, with_rows, rows), (first_cols, with_cols, cols))
        before = [torch.full((n, dim), torch.nan if overwritten else 3.0) for overwritten, _, n in sides]
        totals = [b.clone() if wanted else None for b, (_, wanted, _) in zip(before, sides, strict=True)]
        add_products(*totals, h, y, x, first, first_cols)
        for total, product, (overwritten, _, _) in zip(totals, products, sides, strict=True):
            if total is not None:
                expected = product if overwritten else 3.0 + product
                torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


def test_both_products_in_one_launch_need_room(monkeypatch):
    """Rows of H end within a tile: reading on would leave the buffer."""
    h, x = torch.ones(40, 40), torch.ones(40, 16)
    with pytest.raises(AssertionError, match="room for whole tiles"):
        add_products(None, torch.ones(40, 16), h, x, x, True, True)


# ---- evaluations that are repeated without the plan -----------------------------------------------------------------


@pytest.fixture
def repeating(monkeypatch):
    """Let evaluations be recorded and repeated, on memory that holds no numbers; what has been recorded."""
    monkeypatch.setattr(steps, "enabled", True)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: empty(*a, **k).fill_(255 if k.get("dtype") == torch.uint8 else torch.nan)
    )
    backends._create.cache_clear()
    yield lambda dtype: backends._create("triton", torch.device("cpu"), dtype).steps.described
    backends._create.cache_clear()


@pytest.mark.parametrize(
    ("options", "modalities", "dtype"),
    [
        ({}, 2, torch.float32),
        ({}, 2, torch.float16),
        ({"pairs": "all"}, 3, torch.float16),
        ({"cu_weight": 0.0}, 2, torch.float32),
        ({"normalize_centroids": False}, 2, torch.float16),
    ],
    ids=str,
)
def test_repeated_evaluations(repeating, options, modalities, dtype):
    """The third and fourth are repeated, of other numbers at other addresses."""
    for seed in range(4):
        embeddings = random_embeddings(45, 24, modalities, dtype=dtype, seed=seed)
        assert_matches_oracle(embeddings, 10.0 + seed, "triton", **options)
    # True float32 products are the vendor's, but not in the interpreter.
    assert repeating(dtype) == [""]


def test_repeated_evaluations_in_deterministic_mode(repeating):
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(4):
            assert_matches_oracle(random_embeddings(45, 24, seed=seed), 14.3, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert repeating(torch.float32) == [""]


def test_repeated_evaluations_in_part(repeating):
    """Gradients of some inputs, of single terms, a second time, of an evaluation whose predecessor had none."""
    inputs = [*random_embeddings(20, 12), torch.tensor(7.0)]

    def evaluated(*flags):
        leaves = [v.clone().requires_grad_(flag) for v, flag in zip(inputs, flags, strict=True)]
        return gap_loss(*leaves[:2], logit_scale=leaves[2], backend="triton", return_terms=True), leaves

    for flags in ((True, False, True), (False, True, False), (False, False, False)):
        expected = None
        for turn in range(5):
            terms, leaves = evaluated(*flags)
            found = [terms.loss.detach()]
            if any(flags) and turn != 2:
                terms.loss.backward(retain_graph=True)
                found += [leaf.grad.clone() for leaf in leaves if leaf.requires_grad]
                terms.loss.backward()
                torch.testing.assert_close([leaf.grad / 2 for leaf in leaves if leaf.requires_grad], found[1:])
                expected = expected or found
            torch.testing.assert_close(found, (expected or found)[: len(found)], rtol=0, atol=0)
    expected = None
    for _ in range(4):
        terms, leaves = evaluated(True, True, True)
        found = torch.autograd.grad(terms.centroid_uniformity, leaves[:2], retain_graph=True)
        found += torch.autograd.grad(terms.info_nce + terms.loss, leaves)
        expected = expected or found
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_repeated_evaluations_are_of_one_kind(repeating):
    """What cannot be repeated is planned every time, and whatever the plan looks at makes another kind."""
    x, y = random_embeddings(17, 20)
    kinds = {
        "": lambda: (x.clone(), y.clone()),
        " ": lambda: (torch.cat([x, x], 1)[:, :20], y.clone()),  # another stride between rows
        "aten.clone": lambda: (x.T.contiguous().T, y.clone()),
        "two inputs": lambda: (x, x),
    }
    for _ in range(4):
        for make in kinds.values():
            leaves = [e.detach().requires_grad_() for e in make()]
            loss = gap_loss(*leaves, backend="triton")
            torch.testing.assert_close(loss, gap_loss(*make(), backend="reference"))
            loss.backward()
        assert_matches_oracle([x, y], 14.3, "triton", normalize=False)  # looks for the largest norm
        assert_matches_oracle([x, y], 14.3, "triton", nce_weight=0.0)  # the scale's gradient is made by torch
    refused = repeating(torch.float32)
    for reason in (*kinds, "aten.linalg_vector_norm", "aten.zeros_like"):
        assert any(found.startswith(reason.strip()) if reason.strip() else not found for found in refused), reason
    assert refused.count("") == 2


# ---- sums of one matrix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "n", "dtype"),
    [
        *((number, 37, torch.float32) for number in (1, 8, 16, 20, 23, 28)),
        *((number, 70, torch.float32) for number in (19, 26)),
        *((number, 37, torch.float16) for number in (4, 15, 31)),
    ],
    ids=str,
)
def test_contrasts(number, n, dtype):
    """Weights, ids, limits and softplus, on one tile and on several."""
    compare(CASES[number], random_embeddings(n, 20, dtype=dtype), 14.3, "triton")


def sums_and_gradients(rows, cols, scale, backend, weights, **options):
    """Row and column sums, and the gradients of their weighted sum where sums are finite."""
    leaves = [e.detach().clone().requires_grad_() for e in (rows, cols)]
    leaves.append(torch.tensor(scale, dtype=torch.float64, requires_grad=True))
    sums = similarity_logsumexp(*leaves[:2], logit_scale=leaves[2], matched=False, backend=backend, **options)
    total = sum((s * w)[s.isfinite()].sum() for s, w in zip((sums.rows, sums.cols), weights, strict=True))
    return (sums.rows, sums.cols), torch.autograd.grad(total, leaves)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(2.0, torch.float32), (100.0, torch.float16), (400.0, torch.float32)], ids=str
)
@pytest.mark.parametrize("mask", ["", "ids", "limits", "one limit"])
def test_contrast_sums(monkeypatch, mask, scale, dtype):
    """Signed weights, rows without entries and limits, in range of the constant exponent and beyond; several blocks."""
    monkeypatch.setenv(gradient_blocks.VARIABLE, "32")
    rows, cols = (e[:n] for e, n in zip(random_embeddings(45, 20, dtype=dtype), (45, 38), strict=True))
    options = {}
    if mask == "ids":
        options = {"row_ids": torch.arange(45) % 5, "col_ids": torch.full((38,), 2)}
        options["col_ids"][::3] = 4
    elif mask:
        options["row_limit"] = torch.linspace(-1, 1, 45, dtype=torch.float64) * scale
    if mask == "limits":
        options["col_limit"] = torch.linspace(1, -1, 38, dtype=torch.float64) * scale
    weights = [torch.linspace(-1, 2, n, dtype=torch.float64) * 1e-4 for n in (45, 38)]
    factor = 1e4 if dtype == torch.float16 else 1.0  # the gradient in float16 is that of a scaled loss
    ours, gradients = sums_and_gradients(rows, cols, scale, "triton", [w * factor for w in weights], **options)
    exact, expected = sums_and_gradients(
        rows.double(), cols.double(), scale, "torch", [w * factor for w in weights], **options
    )
    for sums, value in zip(ours, exact, strict=True):
        assert sums.isfinite().equal(value.isfinite())
        assert (mask in ("limits", "one limit")) >= value.isneginf().any()
        finite = value.isfinite()
        torch.testing.assert_close(sums[finite], value[finite], rtol=1e-5, atol=scale * 2e-7)
    rounding = max(TOLERANCE[dtype].gradient, 4 * scale * torch.finfo(torch.float32).eps)
    for gradient, value in zip(gradients, expected, strict=True):
        assert (gradient - value).norm() <= rounding * value.norm()


@pytest.mark.parametrize("bias", [-60.0, -2.0, 200.0])
@pytest.mark.parametrize("with_ids", [False, True])
def test_contrast_softplus(bias, with_ids):
    """Small terms keep their digits, large ones do not overflow; the bits are always the same."""
    rows, cols = (e[:n] for e, n in zip(random_embeddings(70, 20), (45, 70), strict=True))
    ids = {"row_ids": torch.arange(45) % 7, "col_ids": torch.arange(70) % 9} if with_ids else {}
    weight = torch.linspace(-1, 2, 45, dtype=torch.float64)

    def evaluated(dtype, backend):
        leaves = [e.to(dtype).requires_grad_() for e in (rows, cols)]
        leaves += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (9.0, bias)]
        sums, _ = similarity_softplus(
            *leaves[:2], logit_scale=leaves[2], logit_bias=leaves[3], matched=False, backend=backend, **ids
        )
        return sums, torch.autograd.grad(sums @ weight, leaves)

    sums, gradients = evaluated(torch.float32, "triton")
    exact, expected = evaluated(torch.float64, "torch")
    torch.testing.assert_close(sums, exact, rtol=1e-5, atol=0)
    assert torch.equal(sums, evaluated(torch.float32, "triton")[0])
    for gradient, value in zip(gradients, expected, strict=True):
        assert (gradient - value).norm() <= 2e-5 * value.norm()


def test_contrast_passes_on_what_is_not_a_number():
    rows, cols = random_embeddings(6, 8)
    rows[2, 0] = torch.nan
    sums = similarity_logsumexp(rows, cols, row_limit=torch.ones(6), col_limit=torch.ones(6), backend="triton")
    assert sums.rows.isnan().tolist() == [False, False, True, False, False, False]
    assert sums.cols[[0, 1, 3, 4, 5]].isnan().all()


def test_contrast_in_deterministic_mode():
    torch.use_deterministic_algorithms(True)
    try:
        compare(CASES[20], random_embeddings(37, 20), 14.3, "triton")
    finally:
        torch.use_deterministic_algorithms(False)


# ---- entries kept between the passes --------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch):
    """Whether blocks of gradients took kept entries, in order: those of the centroids and then those of the pairs."""
    taken = []
    usable = gradient_tiles.usable_entries
    monkeypatch.setattr(
        gradient_tiles, "usable_entries", lambda *a: taken.append((found := usable(*a)) is not None) or found
    )
    return taken


@pytest.mark.parametrize(("keep", "dtype"), [(True, torch.float16), (False, torch.float32)], ids=str)
def test_kept_entries(monkeypatch, kept, keep, dtype):
    """By blocks whose last tile is a part; the same gradients as from entries made again."""
    monkeypatch.setenv(gradient_blocks.VARIABLE, "48")
    assert_matches_oracle(random_embeddings(70, 20, dtype=dtype), 14.3, "triton", keep_similarities=keep)
    assert any(kept) == keep


def test_kept_entries_within_the_budget(monkeypatch, kept):
    """One of three matrices of 256×256 fits, of which the budget then has nothing left."""
    monkeypatch.setattr("gapkernels.functional.KEPT_SIMILARITY_BYTES", 2 * 4 * 256**2 - 1)
    for width, expected in ((512, 1), (496, 0)):  # shorter rows are multiplied again
        kept.clear()
        leaves = [e.requires_grad_() for e in random_embeddings(40, width, 3)]
        gap_loss(*leaves, pairs="all", cu_weight=0.0, backend="triton").backward()
        assert len(kept) == 3
        assert sum(kept) == expected


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_kept_entries_rounded_to_bfloat16(monkeypatch, kept, scale):
    """As of bf16 embeddings, which the interpreter cannot multiply: within the bound of their gradients."""
    room = triton_backend.TritonBackend._room_for_entries

    def rounded(self, matrices, keep):
        narrow = torch.empty(256, 256, dtype=torch.bfloat16)[:80, :80]
        return [None if r is None else narrow for r in room(self, matrices, keep)]

    monkeypatch.setattr(triton_backend.TritonBackend, "_room_for_entries", rounded)
    for made in (random_embeddings, trained_embeddings):
        embeddings = made(80, 24)
        exact = [e.double().requires_grad_() for e in embeddings]
        ours = [e.clone().requires_grad_() for e in embeddings]
        gap_loss(*exact, logit_scale=scale, backend="reference").backward()
        gap_loss(*ours, logit_scale=scale, keep_similarities=True, backend="triton").backward()
        assert True in kept
        for e, o in zip(exact, ours, strict=True):
            assert (o.grad - e.grad).norm() <= TOLERANCE[torch.bfloat16].gradient * e.grad.norm()
    kept.clear()
    learned = torch.tensor(scale, requires_grad=True)  # its gradient takes logarithms: entries are made again
    gap_loss(*ours, logit_scale=learned, keep_similarities=True, backend="triton").backward()
    assert kept
    assert not any(kept)


def test_kept_entries_of_sums_out_of_range_are_not_used(monkeypatch, kept):
    """In some tiles they are lost, in others they are not. Without the check the gradient of the first is wrong."""
    x, y = random_embeddings(60, 8)
    x[:20], y[:20] = x[:1] + 0.01 * x[:20], -x[:1] + 0.01 * y[:20]
    tolerance = Tolerance(1e-4, 4e-4)
    assert_matches_oracle([x, y], 400.0, "triton", tolerance, cu_weight=0.0, keep_similarities=True)
    assert all(kept)
    tiles = gradient_tiles.gradient_tiles
    monkeypatch.setattr(gradient_tiles, "gradient_tiles", lambda *a, **k: tiles(*a, **{**k, "smallest_log": -1e30}))
    with pytest.raises(AssertionError):
        assert_matches_oracle([x, y], 400.0, "triton", tolerance, cu_weight=0.0, keep_similarities=True)
