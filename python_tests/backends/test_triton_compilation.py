"""The Triton kernels compiled ahead of time for every architecture of the table: registers, spills, shared memory.

Compiled is what the backend asks for, recorded from evaluations that the plan drives.
"""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.architectures import ARCHITECTURES
from gapkernels.backends.triton.device import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels are interpreted in this process (TRITON_INTERPRET=1)", allow_module_level=True)

from backends.triton_launches import compile_for, evaluate, evaluate_sums, recorded

SUM_KERNELS = ("tile_sums_kernel", "log_sums_kernel", "gradient_tiles_kernel")
MATRIX_KERNELS = (*SUM_KERNELS, "softplus_sums_kernel", "both_products_kernel")


def distinct_launches(arch, all_candidates=False, **evaluation):
    with recorded(arch, all_candidates) as launches:
        evaluate(4100, **evaluation)
        evaluate(1100, keep=False, **evaluation)  # terms in one launch; what is not kept is made again
        evaluate(1100, **evaluation)  # entries are kept, in float32 for the gradient of the scale
        evaluate(1100, **{**evaluation, "needs_grad": (*evaluation.get("needs_grad", (True,) * 3)[:-1], False)})
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # another way to the log sums, no library products
        try:
            evaluate(4100, **evaluation)
        finally:
            torch.use_deterministic_algorithms(deterministic)
    return {launch.key: launch for launch in launches if launch.kernel is not None}.values()


def check(launch, arch, tensor_cores=True):
    row = ARCHITECTURES[arch]
    # Centroids of few short rows are float32 in full, for there is little to average roundings over.
    tensor_cores = tensor_cores and "ieee" not in launch.constants.values()
    compiled = compile_for(launch, arch)
    assert compiled.spilled == 0, f"{launch.name} {launch.constants}: {compiled.spilled} bytes spilled"
    assert compiled.shared <= row.shared_memory, f"{launch.name}: {compiled.shared} bytes shared"
    if launch.name in MATRIX_KERNELS and tensor_cores:
        assert row.matrix_instruction in compiled.assembly, f"{launch.name} uses no {row.matrix_instruction}"
    if launch.name in MATRIX_KERNELS and not tensor_cores:
        assert "tf32" not in compiled.assembly, f"{launch.name} rounds float32 operands"


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_sixteen_bits(arch):
    """All configurations of the table in bf16."""
    launches = distinct_launches(arch, all_candidates=True, dim=512)
    assert {launch.name for launch in launches} >= {*SUM_KERNELS, "both_products_kernel"}
    for launch in launches:
        check(launch, arch)


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_float16(arch):
    for launch in distinct_launches(arch, dim=512, dtype=torch.float16):
        if launch.name in MATRIX_KERNELS:
            check(launch, arch)


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_true_float32(arch):
    """With torch's float32 matmul precision at "highest" no operand may be rounded to tf32."""
    assert torch.get_float32_matmul_precision() == "highest"
    for launch in distinct_launches(arch, dim=512, dtype=torch.float32):
        check(launch, arch, tensor_cores=False)


@pytest.mark.parametrize(("dim", "modalities"), [(40, 3), (1024, 2)])
def test_rows_of_other_lengths(dim, modalities):
    """Steps that do not divide the rows, rows longer than one step by far, more modalities."""
    needs_grad = (True,) * (modalities + 1)
    for launch in distinct_launches("sm_90", dim=dim, modalities=modalities, needs_grad=needs_grad):
        check(launch, "sm_90")


CONTRASTS = [{}, {"ids": True}, {"limits": (True, True)}, {"ids": True, "limits": (True, False)}, {"softplus": True}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("contrast", [*CONTRASTS, {"softplus": True, "ids": True}], ids=str)
def test_weights_ids_limits_and_softplus(contrast, dtype):
    """The kernels of contrasts with options: what is added to a tile's arithmetic does not spill."""
    with recorded("sm_90", all_candidates=dtype == torch.bfloat16) as launches:
        evaluate_sums(4100, 512, dtype, **contrast)
    distinct = {launch.key: launch for launch in launches if launch.name in MATRIX_KERNELS}
    wanted = {"softplus_sums_kernel", "gradient_tiles_kernel"} if "softplus" in contrast else set(SUM_KERNELS)
    assert {launch.name for launch in distinct.values()} >= wanted
    for launch in distinct.values():
        check(launch, "sm_90", tensor_cores=dtype == torch.bfloat16)


def test_two_programs_fit_a_hopper_processor():
    """What the default of the forward pass is chosen for: exponentials of one program under the products of another."""
    config = tuning.candidates("tile_sums", "sm_90", torch.bfloat16, 512)[0]
    launch = next(k for k in distinct_launches("sm_90", dim=512) if k.name == "tile_sums_kernel")
    compiled = compile_for(launch, "sm_90")
    assert config.programs_per_processor == 2
    assert 2 * compiled.registers * 32 * config.num_warps <= 65536
    assert 2 * compiled.shared <= 227 * 1024


@pytest.mark.parametrize(("arch", "early"), [("sm_80", False), ("sm_90", True), ("sm_100", True)])
def test_products_that_start_early_wait_before_they_read(monkeypatch, arch, early):
    monkeypatch.setenv("GAPKERNELS_EARLY_LAUNCH", "1")
    with recorded(arch) as launches:
        evaluate(1100, 512)
    launch = next(launch for launch in launches if launch.name == "both_products_kernel")
    assert launch.options.launch_pdl == early
    check(launch, arch)
    before, wait, _ = compile_for(launch, arch).assembly.partition("griddepcontrol.wait")
    assert bool(wait) == early
    if early:  # nothing but the kernel's own parameters
        assert not re.search(r"ld\.global|cp\.async|st\.global|red\.global", before)


def test_table_has_an_entry_for_any_architecture():
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_75", "gfx90a", "gfx950"):
        assert tuning.candidates("tile_sums", arch, torch.bfloat16, 512)
