"""Cases for the CUDA backend without a GPU; see ``test_cuda_on_cpu.py``.

The binding is compiled with plain C++ versions of the two kernels (``cuda_host/kernels.cpp``) that run the kernels' own
order of tiles, masks, formulas and reductions; the O(N·D) steps run in Triton's interpreter. Matrix products with
gradient blocks are torch's: the interpreter has none for bf16.
"""

import ctypes
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from oracle import TOLERANCE, Tolerance, assert_matches_oracle, random_embeddings

from gapkernels import backends, gap_loss
from gapkernels.backends import cuda
from gapkernels.backends.contract import Matrix
from gapkernels.backends.cuda import build
from gapkernels.backends.cuda.kernels import CudaBackend
from gapkernels.backends.triton import backend as triton_backend
from gapkernels.backends.triton import products, tile_sums
from gapkernels.backends.triton.device import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on infinities that are meant
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
            [str(build.source_folder() / "binding.cpp"), str(Path(__file__).parent / "cuda_host" / "kernels.cpp")],
            extra_cflags=[*WARNINGS, *(flag for flag in build.BINDING_FLAGS if flag != "-DUSE_CUDA")],
            extra_include_paths=[str(build.source_folder())],
            build_directory=str(folder),
            is_python_module=False,
        )
    loaded = ctypes.CDLL(str(folder / "gapkernels_cuda_host.so"))
    loaded.gapkernels_driver_problem.restype = ctypes.c_char_p
    loaded.gapkernels_is_encoded.restype = ctypes.c_bool
    return loaded


@pytest.fixture
def on_cpu(library, monkeypatch):
    """Let ``backend="cuda"`` run here, with products that know bf16."""
    assert INTERPRETED
    monkeypatch.setattr(cuda, "unusable_because", lambda device=None, dtype=None: None)
    monkeypatch.setattr(build, "load", lambda: None)
    product = lambda total, left, right, first: total.addmm_(left.float(), right.float())  # noqa: E731
    monkeypatch.setattr(products, "_by_library", lambda dtype: True)
    monkeypatch.setattr(products, "_library_product", product)


def test_schemas_are_registered(library):
    for name in ("similarity_stats", "similarity_grad"):
        schema = str(getattr(torch.ops.gapkernels_cuda, name).default._schema)
        assert schema.startswith(f"gapkernels_cuda::{name}(Tensor")
        assert schema.endswith("-> ()")


@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize("clusters", [1, 7])
def test_order_of_tiles_visits_each_once(library, clusters, height):
    """Every tile with an entry that counts, of every matrix, by exactly one cluster, and no tile twice."""
    sizes = [1, 127, 128, 129, 300, 1024, 1025, 2500, 5000]
    shapes = [(rows, cols, symmetric) for rows, cols in itertools.product(sizes, sizes) for symmetric in (0,)]
    shapes += [(size, size, symmetric) for size in sizes for symmetric in (0b1, 0b10, 0b100)]
    for rows, cols, symmetric in shapes:
        matrices = 3 if symmetric else 2
        visited = Counter()
        for cluster in range(clusters):
            visited.update(walk(library, rows, cols, matrices, symmetric, cluster, clusters, height))
        assert max(visited.values()) == 1
        expected = set()
        for matrix in range(matrices):
            for row, col in itertools.product(range(0, rows, 128 * height), range(0, cols, 128)):
                if not symmetric >> matrix & 1 or col + 127 > row:
                    expected.add((matrix, row, col))
        assert set(visited) == expected, (rows, cols, symmetric)


def test_order_of_tiles_is_balanced(library):
    """No cluster has many more tiles than another: they all take the same time."""
    counts = [len(walk(library, 8192, 8192, 2, 0b10, cluster, 66, 2)) for cluster in range(66)]
    assert max(counts) - min(counts) <= 1


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


def walk(library, rows, cols, matrices, symmetric, cluster, clusters, height):
    room = 20_000
    out = (ctypes.c_int * (3 * room))()
    count = library.gapkernels_walk(rows, cols, matrices, symmetric, cluster, clusters, height, out, room)
    assert count <= room
    return [tuple(out[3 * i : 3 * i + 3]) for i in range(count)]


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
    monkeypatch.setattr(triton_backend, "BLOCK", block)
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
