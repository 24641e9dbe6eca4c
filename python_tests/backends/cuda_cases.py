"""Cases for the CUDA backend without a GPU; see ``test_cuda_on_cpu.py``.

The binding is compiled with plain C++ versions of the kernels (``cuda_host/kernels.cpp`` and ``products.cpp``) that run
their own order of tiles, masks, formulas and reductions; the O(N·D) steps run in Triton's interpreter. Matrix products
with gradient blocks that are not the CUDA kernel's are torch's: the interpreter has none for bf16.
"""

import ctypes
import itertools
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from backends import interpreter
from oracle import TOLERANCE, Tolerance, assert_matches_oracle, random_embeddings

from benchmarks import run_once
from gapkernels import backends, gap_loss
from gapkernels.backends import cuda
from gapkernels.backends.contract import Matrix
from gapkernels.backends.cuda import build, kernels
from gapkernels.backends.cuda.kernels import CudaBackend, Variant
from gapkernels.backends.triton import gradient_blocks, gradient_tiles, products, tile_sums
from gapkernels.backends.triton.backend import EVERYTHING
from gapkernels.backends.triton.device import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on infinities that are meant
interpreter.hasten()
HOST = Path(__file__).parent / "cuda_host"
SIXTEEN_BIT = [torch.bfloat16, torch.float16]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The binding with the plain kernels, loaded."""
    from torch.utils import cpp_extension

    folder = tmp_path_factory.mktemp("cuda_host")
    with build.ninja_on_path():
        cpp_extension.load(
            "gapkernels_cuda_host",
            [str(build.source_folder() / "binding.cpp"), *map(str, sorted(HOST.glob("*.cpp")))],
            extra_cflags=[*WARNINGS, *(flag for flag in build.BINDING_FLAGS if flag != "-DUSE_CUDA")],
            extra_include_paths=[str(build.source_folder())],
            build_directory=str(folder),
            is_python_module=False,
        )
    loaded = ctypes.CDLL(str(folder / "gapkernels_cuda_host.so"))
    loaded.gapkernels_driver_problem.restype = ctypes.c_char_p
    loaded.gapkernels_is_encoded.restype = ctypes.c_bool
    loaded.gapkernels_residency.restype = ctypes.c_char_p
    loaded.gapkernels_handoff.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def on_cpu(library, monkeypatch):
    """Let ``backend="cuda"`` run here, with products that know bf16."""
    assert INTERPRETED
    monkeypatch.setattr(cuda, "unusable_because", lambda device=None, dtype=None: None)
    monkeypatch.setattr(build, "load", lambda: None)

    def product(total, left, right, first):
        total.addmm_(left.float(), right.float(), beta=0 if first else 1)

    monkeypatch.setattr(products, "by_library", lambda dtype: True)
    monkeypatch.setattr(products, "_library_product", product)


def test_schemas_are_registered(library):
    for name in ("similarity_stats", "similarity_grad", "both_products"):
        schema = str(getattr(torch.ops.gapkernels_cuda, name).default._schema)
        assert schema.startswith(f"gapkernels_cuda::{name}(Tensor")
        assert schema.endswith("-> ()")


class Item(NamedTuple):
    """What a walk yields, see ``csrc/tiles.h``."""

    matrix: int
    row_start: int
    col_start: int
    panel: int
    first: int
    left: int


def width_of(variant):
    return 256 if variant is Variant.WIDE else 128


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize("clusters", [1, 7])
def test_order_of_tiles_visits_each_once(library, clusters, height, variant):
    """Every tile with an entry that counts, of every matrix, by exactly one cluster, and no tile twice."""
    sizes = [1, 127, 128, 129, 300, 1024, 1025, 2500, 5000]
    width = width_of(variant)
    shapes = [(rows, cols, symmetric) for rows, cols in itertools.product(sizes, sizes) for symmetric in (0,)]
    shapes += [(size, size, symmetric) for size in sizes for symmetric in (0b1, 0b10, 0b100)]
    for rows, cols, symmetric in shapes:
        matrices = 3 if symmetric else 2
        visited = Counter()
        for cluster in range(clusters):
            items = walk(library, rows, cols, matrices, symmetric, cluster, clusters, height, variant)
            visited.update(item[:3] for item in items)
        assert max(visited.values()) == 1
        expected = set()
        for matrix in range(matrices):
            for row, col in itertools.product(range(0, rows, 128 * height), range(0, cols, width)):
                if not symmetric >> matrix & 1 or col + width - 1 > row:
                    expected.add((matrix, row, col))
        assert set(visited) == expected, (rows, cols, symmetric)


@pytest.mark.parametrize(
    ("size", "variant", "largest"),
    # Strips of a triangle are up to two tiles longer than those of a matrix, and a cluster may get all of one kind.
    [
        (8192, Variant.STREAMED, 1),
        (8192, Variant.WIDE, 1),
        (1024, Variant.RESIDENT, 1),
        (4096, Variant.RESIDENT, 1),
        (8192, Variant.RESIDENT, 1),
        (33000, Variant.RESIDENT, 5),
        (131072, Variant.RESIDENT, 9),
    ],
)
def test_order_of_tiles_is_balanced(library, size, variant, largest):
    """No cluster has many more tiles than another: they all take the same time."""
    counts = [len(walk(library, size, size, 2, 0b10, cluster, 66, 2, variant)) for cluster in range(66)]
    assert max(counts) - min(counts) <= largest


def test_rows_change_rarely(library):
    """A panel is loaded for each strip and where shares begin, no more."""
    for cluster in range(66):
        items = walk(library, 32768, 32768, 2, 0b10, cluster, 66, 2, Variant.RESIDENT)
        assert 700 < len(items) < 800
        assert items[-1].panel < 8


@pytest.mark.parametrize(("rows", "cols", "symmetric"), [(1, 1, 0), (700, 129, 0), (1300, 1300, 0b10), (900, 5000, 0)])
@pytest.mark.parametrize("clusters", [1, 7, 66])
def test_panels_say_where_they_begin_and_end(library, clusters, rows, cols, symmetric):
    """Rows are reloaded with ``first`` and given back as ``left`` runs out: neither may be missing or come twice."""
    for cluster, height in itertools.product(range(clusters), (1, 2)):
        items = walk(library, rows, cols, 2, symmetric, cluster, clusters, height, Variant.RESIDENT)
        for number, (_, group) in enumerate(itertools.groupby(items, key=lambda item: item.panel)):
            panel = list(group)
            assert {item.panel for item in panel} == {number}
            assert {item[:2] for item in panel} == {panel[0][:2]}
            assert [item.col_start for item in panel] == [panel[0].col_start + 128 * i for i in range(len(panel))]
            assert [item.first for item in panel] == [1] + [0] * (len(panel) - 1)
            assert [item.left for item in panel] == list(range(len(panel), 0, -1))


RESIDENCY = [
    # rows, columns, matrices, which are symmetric
    (1, 1, 1, 0),
    (300, 300, 2, 0b10),
    (700, 129, 1, 0),  # panels of two tiles
    (1300, 100, 2, 0),  # of one
    (1300, 1300, 1, 0b1),
]


@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize(("steps", "places"), [(1, 3), (1, 12), (2, 3), (8, 3), (8, 5)])
def test_rows_that_stay_are_there_when_they_are_read(library, steps, places, height):
    """Copies and products of a cluster under hundreds of interleavings: see ``cuda_host/residency.cpp``."""
    for (rows, cols, matrices, symmetric), seed in itertools.product(RESIDENCY, range(4)):
        for clusters in (1, 3):
            total = 0
            for cluster in range(clusters):
                shape = (rows, cols, matrices, symmetric, cluster, clusters, height)
                problem, tiles = residency(library, *shape, steps, places, False, seed)
                assert problem is None, (problem, shape, seed)
                total += tiles
            items = (walk(library, *shape[:4], c, clusters, height, Variant.RESIDENT) for c in range(clusters))
            assert total == height * sum(map(len, items))


def test_rows_given_back_by_the_last_tile_alone_would_be_overwritten(library):
    """The other consumer may have a step left: what the test above would say."""
    problems = {residency(library, 300, 300, 2, 0, 0, 1, 2, 1, 3, True, seed)[0] for seed in range(40)}
    assert b"overwritten while it is read" in problems


HANDOFF = [
    # rows, columns, matrices, which are symmetric
    (1, 1, 1, 0),
    (300, 600, 2, 0),
    (1300, 1300, 2, 0b10),
]


@pytest.mark.parametrize("variant", [Variant.STREAMED, Variant.WIDE])
@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize(("steps", "stages"), [(1, 4), (2, 4), (3, 4), (9, 4), (5, 3)])
def test_consumers_find_what_was_prepared_for_them(library, steps, stages, height, variant):
    """Factors and operands of a cluster under hundreds of interleavings: see ``cuda_host/handoff.cpp``."""
    for shape, seed in itertools.product(HANDOFF, range(4)):
        for clusters in (1, 3):
            total = 0
            for cluster in range(clusters):
                arguments = (*shape, cluster, clusters, height, variant is Variant.WIDE, steps, stages, False, seed)
                problem, tiles = handoff(library, *arguments)
                assert problem is None, (problem, arguments)
                total += tiles
            items = (walk(library, *shape, c, clusters, height, variant) for c in range(clusters))
            assert total == height * sum(map(len, items))


def test_factors_given_back_by_one_of_two_would_be_overwritten(library):
    """The other, which stays behind, still reads them: what the test above would say."""
    problems = {handoff(library, 1300, 1300, 2, 0, 0, 1, 2, True, 2, 4, True, seed)[0] for seed in range(40)}
    assert problems & {b"factors overwritten while they are read", b"factors of another tile"}


def residency(library, *arguments):
    tiles = ctypes.c_int()
    return library.gapkernels_residency(*arguments, ctypes.byref(tiles)), tiles.value


def handoff(library, *arguments):
    tiles = ctypes.c_int()
    return library.gapkernels_handoff(*arguments, ctypes.byref(tiles)), tiles.value


def test_quotients_by_multiplication(library):
    """Of every divisor that a launch may have, at the edges of every quotient's range."""
    largest = 2**31 - 1
    divisors = [*range(1, 1200), *(2**b + d for b in range(11, 30) for d in (-1, 0, 1)), largest]
    for divisor in divisors:
        quotients = {0, 1, 2, 7, largest // divisor // 2, largest // divisor}
        numbers = {q * divisor + d for q in quotients for d in (-1, 0, 1)} | {largest}
        for number in (n for n in numbers if 0 <= n <= largest):
            assert library.gapkernels_quotient(number, divisor) == number // divisor, (number, divisor)


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (0, b"there is no NVIDIA driver"),
        (11080, b"the driver is for CUDA 11.8, the kernels need one for 12.1 or newer"),
        (12000, b"the driver is for CUDA 12.0, the kernels need one for 12.1 or newer"),
        (12010, None),
        (13020, None),
    ],
)
def test_old_drivers_are_named(library, version, problem):
    assert library.gapkernels_driver_problem(version) == problem


def test_copy_descriptors_that_the_driver_refused_are_noticed(library):
    """CUTLASS leaves zeros in their place."""
    assert not library.gapkernels_is_encoded(bytes(128), 128)
    assert library.gapkernels_is_encoded(bytes(127) + b"\1", 128)


def walk(library, rows, cols, matrices, symmetric, cluster, clusters, height, variant):
    room = 20_000
    out = (ctypes.c_int * (6 * room))()
    count = library.gapkernels_walk(
        rows, cols, matrices, symmetric, cluster, clusters, height, variant, out, ctypes.c_int(room)
    )
    assert count <= room
    return [Item(*out[6 * i : 6 * i + 6]) for i in range(count)]


@pytest.mark.parametrize(
    ("choice", "width", "variant"),
    [
        ("", 512, Variant.STREAMED),
        ("", 520, Variant.WIDE),
        ("streamed", 64, Variant.STREAMED),
        ("streamed", 1024, Variant.STREAMED),
        ("resident", 8, Variant.RESIDENT),
        ("resident", 512, Variant.RESIDENT),
        ("resident", 520, Variant.WIDE),
        ("wide", 8, Variant.WIDE),
        ("wide", 1024, Variant.WIDE),
    ],
)
def test_variant_is_the_one_that_the_tables_or_the_environment_name(monkeypatch, choice, width, variant):
    monkeypatch.setenv(kernels.VARIANT_VARIABLE, choice)
    for kernel, dtype in itertools.product(("similarity_stats", "similarity_grad"), SIXTEEN_BIT):
        assert kernels.choose_variant(kernel, dtype, width) is variant


def test_variants_run_from_a_measured_width_on(monkeypatch):
    monkeypatch.delenv(kernels.VARIANT_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "RESIDENT_FROM", {("similarity_grad", torch.bfloat16): 256})
    monkeypatch.setattr(kernels, "WIDE_FROM", {("similarity_grad", torch.bfloat16): 200})
    found = [kernels.choose_variant("similarity_grad", torch.bfloat16, width) for width in (128, 200, 256, 512, 768)]
    assert found == [Variant.STREAMED, Variant.WIDE, Variant.RESIDENT, Variant.RESIDENT, Variant.WIDE]
    assert kernels.choose_variant("similarity_stats", torch.bfloat16, 512) is Variant.STREAMED
    assert kernels.choose_variant("similarity_grad", torch.float16, 512) is Variant.STREAMED


def test_unknown_choice_of_variant_is_named(monkeypatch):
    monkeypatch.setenv(kernels.VARIANT_VARIABLE, "broad")
    message = "GAPKERNELS_CUDA_VARIANT must be 'streamed', 'resident' or 'wide', got 'broad'"
    with pytest.raises(ValueError, match=message):
        kernels.choose_variant("similarity_grad", torch.bfloat16, 512)


@pytest.mark.parametrize(("variant", "dtype"), [("resident", torch.bfloat16), ("wide", torch.float16)], ids=str)
def test_values_of_other_variants(on_cpu, monkeypatch, dtype, variant):
    """The other orders of tiles, in both kernels, triangle included; by blocks in the backward pass."""
    monkeypatch.setenv(kernels.VARIANT_VARIABLE, variant)
    monkeypatch.setenv(gradient_blocks.VARIABLE, "200")
    assert_matches_oracle(random_embeddings(300, 256, dtype=dtype), 14.3, "cuda")


@pytest.mark.parametrize(("n", "dim", "dtype"), [(3, 7, torch.float16), (257, 40, torch.bfloat16)])
def test_values_of_wide_tiles(on_cpu, monkeypatch, n, dim, dtype):
    """Fewer columns than one has, and one more: parts of tiles that do not exist have no place for their moment."""
    monkeypatch.setenv(kernels.VARIANT_VARIABLE, "wide")
    assert_matches_oracle(random_embeddings(n, dim, dtype=dtype), 14.3, "cuda")


def test_sanitizer_sees_narrow_and_wide_tiles(monkeypatch):
    """Under compute-sanitizer `make gpu` runs what is chosen by default."""
    monkeypatch.delenv(kernels.VARIANT_VARIABLE, raising=False)
    widths = [int(size.partition("x")[2]) for size in run_once.ODD_SIZES.split(",")]
    seen = {kernels.choose_variant("similarity_stats", torch.bfloat16, width) for width in widths}
    assert seen >= {Variant.STREAMED, Variant.WIDE}


def test_values_of_rows_too_long_to_stay(on_cpu):
    """Tiles are wide by default."""
    assert kernels.choose_variant("similarity_grad", torch.bfloat16, 600) is Variant.WIDE
    assert_matches_oracle(random_embeddings(130, 600, dtype=torch.bfloat16), 14.3, "cuda")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant.RESIDENT, "rows of at most 512 numbers can stay in shared memory, got 520"),
        (3, "there are 3 variants, got number 3"),
    ],
)
def test_variants_that_cannot_be_are_refused(library, variant, message):
    x, ones, sums = torch.zeros(20, 520, dtype=torch.float16), torch.ones(20), torch.zeros(20)
    matrix = [x], [ones], [x], [ones], [torch.ones(())], [False], [False]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gapkernels_cuda.similarity_stats(*matrix, None, 0, 100.0, variant, sums, sums, [])


def test_places_for_entries_that_do_not_fit_are_refused(library):
    x, ones, sums = torch.zeros(20, 8, dtype=torch.bfloat16), torch.ones(20), torch.zeros(20)
    matrix = [x], [ones], [x], [ones], [torch.ones(())], [False], [False]
    room = torch.zeros(20, 24, dtype=torch.bfloat16)
    for kept, message in (
        (room, "kept must be bfloat16 of 20 rows and 20 columns, got 20 and 24"),
        (room.half()[:, :20], "kept must be bfloat16"),
        (room[:, 1:21], "aligned to 16 bytes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gapkernels_cuda.similarity_stats(*matrix, None, 0, 100.0, 0, sums, sums, [kept])


@pytest.mark.parametrize(
    ("n", "dim", "scale", "dtype"),
    [
        (2, 1, 14.3, torch.float16),
        (3, 7, 100.0, torch.bfloat16),
        (129, 64, 1.0, torch.float16),
        (300, 100, 14.3, torch.bfloat16),
        (257, 40, 100.0, torch.float16),
    ],
)
def test_values(on_cpu, n, dim, scale, dtype):
    tolerance = TOLERANCE[dtype]
    if n == 3:  # Triton's interpreter cuts numbers off to bf16 where a GPU rounds, and so few rows average nothing
        tolerance = tolerance._replace(gradient=2 * tolerance.gradient)
    assert_matches_oracle(random_embeddings(n, dim, dtype=dtype), scale, "cuda", tolerance)


def test_values_of_one_sample(on_cpu):
    """No entry but the diagonal: every sum is empty."""
    assert_matches_oracle(random_embeddings(1, 16, dtype=torch.bfloat16), 14.3, "cuda", cu_weight=0.0)


@pytest.mark.parametrize(
    ("dtype", "normalize", "pairs"), [(torch.bfloat16, True, "all"), (torch.float16, False, "anchor")]
)
def test_values_for_modalities_and_options(on_cpu, dtype, normalize, pairs):
    embeddings = [e if normalize else e / 4 for e in random_embeddings(140, 24, 3, dtype=dtype)]
    assert_matches_oracle(embeddings, 9.0, "cuda", anchor=1, pairs=pairs, normalize=normalize)


def test_values_for_more_matrices_than_a_launch_takes(on_cpu):
    assert_matches_oracle(random_embeddings(40, 16, 5, dtype=torch.float16), 9.0, "cuda", pairs="all")


@pytest.mark.parametrize(("dtype", "nce_weight"), [(torch.float16, 1.0), (torch.bfloat16, 1.0), (torch.float16, 0.0)])
def test_values_of_centroids_in_float16(on_cpu, dtype, nce_weight):
    """More than are kept in float32: the triangle of the kernel, in a launch with pairs, after them, alone."""
    assert_matches_oracle(random_embeddings(260, 256, dtype=dtype), 14.3, "cuda", nce_weight=nce_weight)


@pytest.mark.parametrize(("block", "dim", "modalities"), [(128, 24, 3), (200, 256, 2)])
def test_values_by_blocks_of_gradients(on_cpu, monkeypatch, block, dim, modalities):
    monkeypatch.setenv(gradient_blocks.VARIABLE, str(block))
    embeddings = random_embeddings(260, dim, modalities, dtype=torch.float16)
    assert_matches_oracle(embeddings, 14.3, "cuda", pairs="all")


def test_values_of_log_sums_far_apart_in_one_tile(on_cpu):
    """Two exponentials per entry."""
    x, y = random_embeddings(140, 8)
    x[:20], y[:20] = x[:1] + 0.01 * x[:20], -x[:1] + 0.01 * y[:20]
    assert_matches_oracle([x.half(), y.half()], 400.0, "cuda", Tolerance(1e-4, 4e-3))


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_values_of_sums_left_below_the_range(on_cpu, scale):
    x, y = random_embeddings(60, 8)
    x, y = x[:1] + 0.04 * x, -x[:1] + 0.04 * y
    loss = max(TOLERANCE[torch.float16].loss, 4 * scale * torch.finfo(torch.float32).eps)
    assert_matches_oracle([x.half(), y.half()], scale, "cuda", Tolerance(loss, 4e-3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_not_hidden(on_cpu, bad):
    x, y = random_embeddings(140, 8, dtype=torch.float16)
    x[4, 2] = bad
    x.requires_grad_()
    loss = gap_loss(x, y, backend="cuda")
    loss.backward()
    assert not torch.isfinite(loss)
    assert not torch.isfinite(x.grad).all()


def test_float32_matrices_are_left_to_triton(on_cpu, monkeypatch):
    """The few centroids of a small problem stay in float32, which has no tensor-core product of that precision."""
    seen = []
    original = tile_sums.tile_sums
    monkeypatch.setattr(tile_sums, "tile_sums", lambda *a: seen.append(a[0][0].rows.dtype) or original(*a))
    gap_loss(*random_embeddings(20, 8, dtype=torch.float16), backend="cuda")
    assert seen == [torch.float32]


def test_refusals(on_cpu, library):
    x, y = random_embeddings(20, 16)
    with pytest.raises(TypeError, match=r"backend='cuda' takes bfloat16, float16 embeddings, got float32.*'triton'"):
        gap_loss(x, y, backend="cuda")
    with pytest.raises(TypeError, match=r"got float64; choose backend='torch'"):
        gap_loss(x.double(), y.double(), backend="cuda")
    assert "cuda" in backends.NAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(20, 12, dtype=torch.float16)[:, 1:9]}, "aligned to 16 bytes"),
        ({"cols": torch.zeros(20, 8, dtype=torch.bfloat16)}, "agree in length and type"),
        ({"rows": torch.zeros(20, 16, dtype=torch.float16)}, "agree in length and type"),
        ({"cols": torch.zeros(24, 8, dtype=torch.float16), "symmetric": True}, "must be square, got 20 rows and 24"),
        ({"row_factor": torch.zeros(19)}, "20 contiguous float32 numbers, got 19"),
        ({"scale": torch.zeros(2)}, "one float32 or float64 number"),
    ],
)
def test_operators_check_what_the_copy_engine_needs(library, change, message):
    x = torch.zeros(20, 8, dtype=torch.float16)
    good = Matrix(x, torch.zeros(20), x, torch.zeros(20), torch.ones(()))
    CudaBackend().tile_sums([good], None, 100)
    with pytest.raises(RuntimeError, match=message):
        CudaBackend().tile_sums([good._replace(**change)], None, 100)


def test_operators_refuse_more_tiles_than_they_can_number(library):
    x = torch.zeros(1, 8, dtype=torch.float16).expand(2**22, 8)
    matrix = Matrix(x, torch.zeros(1), x, torch.zeros(1), torch.ones(()))
    with pytest.raises(RuntimeError, match=r"at most 1073741824 tiles, got 2147483648"):
        CudaBackend().tile_sums([matrix, matrix], None, 100)


# ---- entries kept between the passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["streamed", "resident", "wide"])
@pytest.mark.parametrize(("num_rows", "num_cols"), [(1, 1), (300, 139), (257, 600)])
def test_kept_entries_are_those_that_were_added_up(library, monkeypatch, num_rows, num_cols, variant):
    """In bfloat16, zero on the diagonal; nothing is written below the last row."""
    monkeypatch.setenv(kernels.VARIANT_VARIABLE, variant)
    generator = torch.Generator().manual_seed(1)
    rows, cols = (torch.randn(n, 24, generator=generator).bfloat16() for n in (num_rows, num_cols))
    row_factor, col_factor = (1 / x.double().norm(dim=1) for x in (rows, cols))
    pair = Matrix(rows, row_factor.float(), cols, col_factor.float(), torch.tensor(14.3), diagonal=0)
    (room,) = CudaBackend()._room_for_entries([pair], EVERYTHING)
    whole = torch.as_strided(room, (num_rows + 1, room.stride(0)), room.stride()) if num_rows % 256 else room
    whole.fill_(-1.0)
    row_sums, col_sums = CudaBackend().tile_sums([pair], None, 100, kept=[room])
    expected = (14.3 * (rows.double() * row_factor[:, None]) @ (cols.double() * col_factor[:, None]).T).exp()
    expected.fill_diagonal_(0.0)
    torch.testing.assert_close(room.double(), expected, rtol=2**-8, atol=0.0)
    assert (whole[num_rows:] == -1.0).all()
    torch.testing.assert_close(row_sums[0].double(), expected.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(col_sums[0].double(), expected.sum(0), rtol=1e-5, atol=1e-6)


@pytest.fixture
def kept(monkeypatch):
    """Whether blocks of pairs took kept entries, in order."""
    taken = []

    def usable(block, moment):
        found = gradient_tiles.usable_entries(block, moment)
        if not block.biased:
            taken.append(found is not None)
        return found

    monkeypatch.setattr(kernels, "usable_entries", usable)
    return taken


@pytest.mark.parametrize(("n", "dim", "variant"), [(300, 256, "wide"), (300, 24, "streamed"), (70, 24, "wide")])
def test_values_from_kept_entries(on_cpu, monkeypatch, kept, n, dim, variant):
    """Triton's gradient from the kernel's entries, by blocks whose last tile is a part."""
    monkeypatch.setenv(kernels.VARIANT_VARIABLE, variant)
    monkeypatch.setenv(gradient_blocks.VARIABLE, "160")
    embeddings = random_embeddings(n, dim, 3, dtype=torch.bfloat16)
    exact = [e.double().requires_grad_() for e in embeddings]
    ours = [e.clone().requires_grad_() for e in embeddings]
    gap_loss(*exact, logit_scale=14.3, backend="reference").backward()
    gap_loss(*ours, logit_scale=14.3, keep_similarities=True, backend="cuda").backward()
    assert kept
    assert all(kept)
    for e, o in zip(exact, ours, strict=True):
        # Twice, for an interpreter that cuts H off to bf16 where a GPU rounds.
        assert (o.grad - e.grad).norm() <= 2 * TOLERANCE[torch.bfloat16].gradient * e.grad.norm()


@pytest.mark.parametrize(("dtype", "learned"), [(torch.float16, False), (torch.bfloat16, True)])
def test_nothing_is_kept_where_bfloat16_is_too_coarse(on_cpu, kept, dtype, learned):
    x, y = (e.requires_grad_() for e in random_embeddings(40, 256, dtype=dtype))
    scale = torch.tensor(14.3, requires_grad=learned)
    gap_loss(x, y, logit_scale=scale, keep_similarities=True, backend="cuda").backward()
    assert kept
    assert not any(kept)


# ---- products of blocks ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What a cluster computes of an item, see ``csrc/shares.h``."""

    cluster: int
    product: int
    row_start: int
    col_start: int
    first_step: int
    steps: int


HOST_CLUSTERS = 7
"""As in ``cuda_host/products.cpp``."""

STORE_STEPS = 4
"""What adding a part takes, as in ``csrc/shares.h``."""


def shares(library, rows, cols, dim, clusters, height=2, wanted=(True, True)):
    """``(parts, longest, splits)`` of a launch."""
    room = 20_000
    out, longest, splits = (ctypes.c_int * (6 * room))(), ctypes.c_int(), ctypes.c_bool()
    arguments = rows, cols, dim, *wanted, clusters, height, out, room, ctypes.byref(longest), ctypes.byref(splits)
    count = library.gapkernels_shares(*arguments)
    assert count <= room
    return [Part(*out[6 * i : 6 * i + 6]) for i in range(count)], longest.value, splits.value


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize("clusters", [1, 7, 66])
def test_parts_are_every_step_of_every_tile_once(library, clusters, height, wanted):
    """And the count by which a launch is dealt out is theirs: no share is longer than it has to be."""
    sizes = [1, 64, 127, 129, 300, 1025, 4096]
    seen = set()
    for rows, cols, dim in itertools.product(sizes, sizes, (8, 256, 264, 768)):
        parts, longest, splits = shares(library, rows, cols, dim, clusters, height, wanted)
        covered = {}
        for part in parts:
            covered.setdefault(part[1:4], []).append((part.first_step, part.first_step + part.steps))
        expected, total = {}, 0
        for product, (tall, deep) in enumerate([(rows, cols), (cols, rows)]):
            if wanted[product]:
                steps = -(-deep // 64)
                for row, col in itertools.product(range(0, tall, 128 * height), range(0, dim, 256)):
                    expected[product, row, col] = steps
                    total += steps
        assert covered.keys() == expected.keys()
        for item, ranges in covered.items():
            ends = [0, *(end for _, end in sorted(ranges))]
            assert [begin for begin, _ in sorted(ranges)] == ends[:-1]
            assert ends[-1] == expected[item]
            assert splits or len(ranges) == 1
        counts = Counter()
        for part in parts:
            counts[part.cluster] += part.steps + STORE_STEPS
        assert longest == max(counts.values())
        if splits:
            # An equal share, each of whose two ends may have moved, and what adding its parts takes.
            most_parts = max(Counter(part.cluster for part in parts).values())
            assert longest <= -(-total // clusters) + (2 + most_parts) * STORE_STEPS
            lengths = list(expected.values())
            if len(set(lengths)) == 1:  # otherwise it would have dealt out whole items
                assert longest < -(-len(lengths) // clusters) * (lengths[0] + STORE_STEPS)
        seen.add(splits)
    assert seen == ({True, False} if clusters > 1 else {False})


@pytest.mark.parametrize(
    ("rows", "cols", "dim", "longest", "splits"),
    [
        (4096, 4096, 256, 39, True),  # half as many tiles as clusters
        (4096, 4096, 512, 68, False),  # two clusters idle
        (4096, 4096, 768, 106, True),  # 96 tiles, two whole ones for some would take 136
        (300, 4096, 512, 18, True),  # few deep tiles and many shallow ones
    ],
)
def test_blocks_are_split_where_tiles_do_not_fill_the_processors(library, rows, cols, dim, longest, splits):
    assert shares(library, rows, cols, dim, 66)[1:] == (longest, splits)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "dim", "splits"),
    [(1, 1, 8, False), (33, 70, 48, False), (139, 300, 264, False), (130, 900, 40, True), (700, 70, 8, True)],
)
def test_products_of_a_block(library, rows, cols, dim, splits, dtype):
    """Added to what is there, or put in its place; either one alone; what lies past edges does not count."""
    assert shares(library, rows, cols, dim, HOST_CLUSTERS)[2] is splits
    generator = torch.Generator().manual_seed(0)

    def inside(height, width, values):
        room = torch.full((height + 5, width + 24 - width % 8), torch.nan, dtype=values.dtype)
        room[:height, :width] = values
        return room[:height, :width]

    h = inside(rows, cols, torch.rand(rows, cols, generator=generator).to(dtype))
    y, x = (inside(n, dim, torch.randn(n, dim, generator=generator).to(dtype)) for n in (cols, rows))
    products_ = h.double() @ y.double(), h.double().T @ x.double()
    for first, first_cols, with_rows, with_cols in itertools.product([True, False], repeat=4):
        sides = ((first, with_rows, rows), (first_cols, with_cols, cols))
        rooms = [torch.full((n + 3, dim + 8), torch.nan if overwritten else 3.0) for overwritten, _, n in sides]
        totals = [room[:n, :dim] if wanted else None for room, (_, wanted, n) in zip(rooms, sides, strict=True)]
        torch.ops.gapkernels_cuda.both_products(h, y, x, *totals, first, first_cols)
        for room, total, product, (overwritten, _, n) in zip(rooms, totals, products_, sides, strict=True):
            outside = torch.ones_like(room, dtype=torch.bool)
            if total is not None:
                expected = product if overwritten else 3.0 + product
                torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)
                outside[:n, :dim] = False
            left = room[outside]
            assert left.isnan().all() if overwritten else (left == 3.0).all()


@pytest.fixture
def own_products(on_cpu, monkeypatch):
    """Products of 16-bit blocks are the CUDA kernel's; how many blocks there were."""
    blocks = []
    launch, by_torch = CudaBackend.both_products, products._library_product

    def counted(self, total_rows, total_cols, h, *others):
        blocks.append(h.dtype)
        return launch(self, total_rows, total_cols, h, *others)

    def of_float32(total, left, right, first):
        assert left.dtype == torch.float32
        by_torch(total, left, right, first)

    monkeypatch.setenv(products.VARIABLE, "cuda")
    monkeypatch.setattr(CudaBackend, "both_products", counted)
    monkeypatch.setattr(products, "_library_product", of_float32)
    return blocks


@pytest.mark.parametrize(
    ("n", "dim", "modalities", "block", "dtype"),
    [
        (3, 7, 2, 4096, torch.bfloat16),
        (3, 7, 2, 4096, torch.float16),
        (129, 40, 3, 4096, torch.bfloat16),
        (129, 40, 3, 4096, torch.float16),
        (300, 256, 2, 200, torch.float16),
        (260, 264, 3, 128, torch.bfloat16),
    ],
    ids=str,
)
def test_values_by_own_products(own_products, monkeypatch, n, dim, modalities, block, dtype):
    """Of one block, and of several, of which the first overwrite; centroids of long rows have a triangle of blocks."""
    monkeypatch.setenv(gradient_blocks.VARIABLE, str(block))
    tolerance = TOLERANCE[dtype]
    if n == 3:  # as in test_values
        tolerance = tolerance._replace(gradient=2 * tolerance.gradient)
    embeddings = random_embeddings(n, dim, modalities, dtype=dtype)
    assert_matches_oracle(embeddings, 14.3, "cuda", tolerance, pairs="all")
    assert own_products.count(dtype) >= modalities * (modalities - 1) // 2 * (-(-n // block)) ** 2


@pytest.mark.parametrize(
    ("choice", "width", "own"),
    [("", 128, False), ("", 136, True), ("cuda", 8, True), ("triton", 512, False), ("library", 512, False)],
)
def test_products_are_whose_the_count_or_the_environment_says(monkeypatch, choice, width, own):
    monkeypatch.setenv(products.VARIABLE, choice)
    assert [kernels.takes_products(dtype, width) for dtype in SIXTEEN_BIT] == [own, own]
    assert not kernels.takes_products(torch.float32, width)


def test_products_are_own_from_a_measured_width_on(monkeypatch):
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "PRODUCTS_FROM", {torch.bfloat16: 700})
    assert [kernels.takes_products(dtype, 512) for dtype in SIXTEEN_BIT] == [False, True]
    assert kernels.takes_products(torch.bfloat16, 768)


def test_products_in_deterministic_mode_are_tritons(monkeypatch):
    """Parts of a tile are added in any order."""
    monkeypatch.setenv(products.VARIABLE, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        assert not kernels.takes_products(torch.bfloat16, 512)
    finally:
        torch.use_deterministic_algorithms(False)


def test_unknown_choice_of_products_is_named(monkeypatch):
    monkeypatch.setenv(products.VARIABLE, "cublas")
    with pytest.raises(ValueError, match="GAPKERNELS_PRODUCTS must be 'library', 'triton' or 'cuda', got 'cublas'"):
        kernels.takes_products(torch.bfloat16, 512)


def test_sanitizer_sees_own_and_tritons_products(monkeypatch):
    monkeypatch.delenv(products.VARIABLE, raising=False)
    widths = [int(size.partition("x")[2]) for size in run_once.ODD_SIZES.split(",")]
    assert {kernels.takes_products(torch.bfloat16, width) for width in widths} == {True, False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(20, 24, dtype=torch.float16)}, "20 rows and 24 columns needs as many rows and columns"),
        ({"cols": torch.zeros(16, 8, dtype=torch.bfloat16)}, "must be of one type"),
        ({"rows": torch.zeros(20, 16, dtype=torch.float16)}, "of one length, got 20 of 16 and 16 of 8"),
        ({"total_rows": torch.zeros(20, 12)}, "total_rows must be float32 of 20 rows and 8 columns"),
        ({"total_cols": torch.zeros(16, 9)[:, :8]}, "total_cols must be aligned to 16 bytes .* got stride 9"),
        ({"h": torch.zeros(20, 17, dtype=torch.float16)[:, :16]}, "h must be aligned to 16 bytes"),
    ],
)
def test_products_check_what_the_copy_engine_needs(library, change, message):
    good = {
        "h": torch.zeros(20, 16, dtype=torch.float16),
        "cols": torch.zeros(16, 8, dtype=torch.float16),
        "rows": torch.zeros(20, 8, dtype=torch.float16),
        "total_rows": torch.zeros(20, 8),
        "total_cols": torch.zeros(16, 8),
    }
    torch.ops.gapkernels_cuda.both_products(*good.values(), True, False)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gapkernels_cuda.both_products(*(good | change).values(), True, False)


def test_products_that_the_copy_engine_cannot_write_are_left_to_triton(on_cpu, monkeypatch):
    monkeypatch.setenv(products.VARIABLE, "cuda")
    h, x = torch.ones(40, 40, dtype=torch.float16), torch.ones(40, 8, dtype=torch.float16)
    total = torch.full((40, 9), torch.nan)[:, :8]
    CudaBackend().both_products(total, None, h, x, x, True, True)
    assert (total == 40.0).all()
