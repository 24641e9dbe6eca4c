"""Every Triton kernel, compiled for every architecture without a GPU: no spills, matrix instructions, shared memory."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.device import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels are interpreted in this process (TRITON_INTERPRET=1)", allow_module_level=True)

from gapkernels.backends.triton import resources

MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


def check(source, arch, tensor_cores=True):
    compiled = resources.compile_for(source, arch)
    assert compiled.spilled == 0, f"{source.name} {source.config}: {compiled.spilled} bytes spilled"
    assert compiled.shared <= resources.SHARED_MEMORY_LIMIT[arch], f"{source.name}: {compiled.shared} bytes shared"
    multiplies = source.config is not None and source.config.tile_m > 0
    if multiplies and tensor_cores:
        assert MATRIX_INSTRUCTION[arch] in compiled.assembly, f"{source.name} uses no {MATRIX_INSTRUCTION[arch]}"
    if multiplies and not tensor_cores:
        assert "tf32" not in compiled.assembly, f"{source.name} rounds float32 operands"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", list(resources.TARGETS))
def test_matrix_kernels_in_sixteen_bits(arch, dtype):
    """All configurations of the table in bf16; in fp16 the default ones, whose code differs by the type alone."""
    seen = set()
    for source in resources.matrix_kernels(arch, dtype):
        if dtype == torch.bfloat16 or source.name not in seen:
            check(source, arch)
        seen.add(source.name)


@pytest.mark.parametrize("arch", list(resources.TARGETS))
def test_matrix_kernels_in_true_float32(arch):
    """With torch's float32 matmul precision at "highest" no operand may be rounded to tf32."""
    assert torch.get_float32_matmul_precision() == "highest"
    for source in resources.matrix_kernels(arch, torch.float32):
        check(source, arch, tensor_cores=False)


@pytest.mark.parametrize("arch", list(resources.TARGETS))
def test_kernels_that_keep_whole_rows(arch):
    """Where rows are too long to fit the registers, the table must not have an entry."""
    for source in resources.whole_row_kernels(arch, torch.bfloat16):
        check(source, arch)
    for source in resources.whole_row_kernels(arch, torch.float32):
        check(source, arch, tensor_cores=False)
    assert not tuning.candidates("gradient_rows", arch, torch.bfloat16, 512)


@pytest.mark.parametrize("arch", list(resources.TARGETS))
def test_row_kernels(arch):
    for source in resources.row_kernels(torch.bfloat16):
        check(source, arch)


@pytest.mark.parametrize("dim", [40, 1024])
def test_rows_of_other_lengths(dim):
    """Steps that do not divide the rows, and rows longer than one step by far."""
    for source in [
        *resources.matrix_kernels("sm_90", dim=dim),
        *resources.whole_row_kernels("sm_90", dims=(dim,)),
        *resources.row_kernels(dim=1 << (dim - 1).bit_length()),
    ]:
        check(source, "sm_90")


def test_two_programs_fit_a_hopper_processor():
    """What the default of the forward pass is chosen for: exponentials of one program under the products of another."""
    source = next(resources.matrix_kernels("sm_90"))
    compiled = resources.compile_for(source, "sm_90")
    assert source.config.programs_per_processor == 2
    assert 2 * compiled.registers * 32 * source.config.num_warps <= 65536
    assert 2 * compiled.shared <= 227 * 1024


def test_table_has_an_entry_for_any_architecture():
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_75", "gfx90a", "gfx950"):
        assert tuning.candidates("tile_sums", arch, torch.bfloat16, 512)


def test_batch_size_is_never_specialised():
    """A new batch size must not compile anything: neither its divisibility nor the value one is looked at."""
    sources = [
        *resources.matrix_kernels("sm_90"),
        *resources.whole_row_kernels("sm_90"),
        *resources.row_kernels(),
    ]
    for source in sources:
        free = {p.name for p in source.kernel.params if p.do_not_specialize}
        sizes = {"num_rows", "num_cols", "total_rows", "all_rows", "first_row", "first_own", "diagonal", "depth"}
        sizes |= {"num_partials", "stacked_rows", "stop_row", "num_splits", "num_centroid_splits"}
        assert sizes & set(source.kernel.arg_names) <= free, source.name
