"""The predictions of docs/kernels.md, and what a GPU run writes beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels, predictions

SYNTHETIC = {
    "gapkernels-triton": [
        {"kernel": "tile_sums_kernel", "share": 0.2, "calls": 1.0, "milliseconds": 3.25},
        {"kernel": "both_products_kernel", "share": 0.3, "calls": 100.0, "milliseconds": 6.5},
        {"kernel": "row_gradients_kernel", "share": 0.1, "calls": 1.0, "milliseconds": 0.25},
        {"kernel": "operands_kernel", "share": 0.1, "calls": 2.0, "milliseconds": 0.125},
    ],
    "gapkernels-cuda": [
        {
            "kernel": "void gapkernels::persistent_kernel<gapkernels::(anonymous namespace)::BothProducts<"
            "cutlass::bfloat16_t>>(…)",
            "share": 0.4,
            "calls": 100.0,
            "milliseconds": 5.5,
        }
    ],
    "gapkernels-triton: products by the library": [
        {"kernel": "nvjet_sm90_tst_128x256_64x4", "share": 0.4, "calls": 100.0, "milliseconds": 5.0},
        {"kernel": "gradient_tiles_kernel", "share": 0.4, "calls": 100.0, "milliseconds": 9.0},
    ],
    "gapkernels-cuda: resident": [
        {
            "kernel": "void gapkernels::persistent_kernel<gapkernels::Persistent<cutlass::bfloat16_t, "
            "gapkernels::StatsEpilogue<128>, gapkernels::Resident>>(…)",
            "share": 0.4,
            "calls": 1.0,
            "milliseconds": 1.75,
        },
        {
            "kernel": "void gapkernels::persistent_kernel<gapkernels::Persistent<cutlass::bfloat16_t, "
            "gapkernels::GradEpilogue<cutlass::bfloat16_t, 128>, gapkernels::Resident>>(…)",
            "share": 0.4,
            "calls": 100.0,
            "milliseconds": 2.5,
        },
    ],
}


def cells(text: str) -> dict[str, str]:
    """The last column of the table by stage; … stands for the kernel above."""
    found, kernel = {}, ""
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line:
            columns = [column.strip() for column in line[1:-1].split("|")]
            kernel = kernel if columns[0].startswith("…") else columns[0]
            found[columns[0].replace("…", kernel)] = columns[-1]
    return found


def test_page_shows_the_predictions() -> None:
    text = predictions.PAGE.read_text(encoding="utf-8")
    shown = text.partition(f"<!-- {predictions.BLOCK}:begin -->\n")[2]
    shown = shown.partition(f"\n<!-- {predictions.BLOCK}:end -->")[0]
    expected = predictions.block({})
    without = [line.rpartition(" | ")[0] for line in shown.splitlines()]  # the last column may hold a GPU's figures
    assert without == [line.rpartition(" | ")[0] for line in expected.splitlines()], "python -m benchmarks.predictions"
    assert predictions.block_sides() in text, "python -m benchmarks.predictions"


def test_measurements_stand_beside_their_predictions(tmp_path: Path) -> None:
    measured, page = tmp_path / "kernels.json", tmp_path / "kernels.md"
    measured.write_text(json.dumps(SYNTHETIC), encoding="utf-8")
    predictions.main([str(measured), "--out", str(page)])
    shown = cells(page.read_text(encoding="utf-8").partition(f"<!-- {predictions.BLOCK}:begin -->")[2])
    assert shown["`tile_sums`, Triton"] == "3.25"
    assert shown["`both_products`, Triton"] == "6.50"
    assert shown["`both_products`, CUDA"] == "5.50"
    assert shown["`both_products`, Triton by the library"] == "5.00"
    assert shown["`row_statistics`, `centroids` (twice), `operands`, `row_gradients`"] == "0.38"
    assert shown["`similarity_stats` rows stay"] == "1.75"
    assert shown["`similarity_grad` rows stay"] == "2.50"
    assert shown["`similarity_stats`"] == shown["`similarity_grad` cluster of one"] == ""


def test_measurements_have_the_keys_that_the_kernels_are_measured_under() -> None:
    keys = {stage.measured_as[0] for stage in predictions.stages()}
    assert keys == {"gapkernels-triton", "gapkernels-cuda", *map(kernels.label, kernels.VARIANTS)}


def test_counts_of_a_tile() -> None:
    """Streamed 128×128 tiles: 64 operations per byte, 85 where two blocks share columns, 160 bytes a clock shared."""
    assert 1 / predictions.tile_bytes(1, 1, False)[0] == pytest.approx(64)
    assert 1 / predictions.tile_bytes(1, 0.5, False)[0] == pytest.approx(256 / 3)
    assert 1 / predictions.tile_bytes(1, 1, False, width=256)[0] == pytest.approx(256 / 3)
    assert predictions.tile_bytes(1, 1, False)[1] * predictions.OPERATIONS == pytest.approx(96 + 64)
    # Wide and shared: 32 bytes a clock through L2 at full rate, 80 + 48 of shared memory.
    l2, shared = (bytes_ * predictions.OPERATIONS for bytes_ in predictions.tile_bytes(1, 0.5, False, width=256))
    assert (l2, shared) == pytest.approx((32, 80 + 48))
    assert predictions.tile_bytes(0, 0.5, False, rows_copied=0)[1] * predictions.OPERATIONS == pytest.approx(96 + 32)


def test_a_variant_that_does_not_run_is_said_and_takes_nothing_from_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels.json"
    kernel = {"kernel": "k", "share": 1.0, "calls": 1.0, "milliseconds": 1.0}

    def measure(variant: str, size: str) -> tuple[list[dict[str, object]], str]:
        return ([], "no such instruction") if "cluster of one" in variant else ([kernel], "")

    monkeypatch.setattr(kernels, "our_backends", lambda device: ["gapkernels-cuda"])  # variants of its own only
    monkeypatch.setattr(kernels, "time_by_kernel", lambda case, device: [kernel])
    monkeypatch.setattr(kernels, "measure_variant", measure)
    kernels.main(["--out", str(out), "--device", "cpu"])
    found = json.loads(out.read_text(encoding="utf-8"))
    others = [v for v in kernels.VARIANTS if kernels.label(v).startswith("gapkernels-cuda") and "of one" not in v]
    assert list(found) == ["gapkernels-cuda", *map(kernels.label, others)]
    assert "gapkernels-cuda: resident, cluster of one: no such instruction" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_variant_is_a_process_with_its_environment() -> None:
    """Without a GPU it says why it cannot run, instead of another variant's figures."""
    found, problem = kernels.measure_variant("resident", "16x8")
    assert found == []
    assert "CUDA" in problem or "NVIDIA" in problem


def test_tiles_of_products_are_the_default_ones() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from gapkernels.backends.triton import tuning

    for width in (64, 256, 512, 768):
        for arch in ("sm_80", "sm_90", "sm_100"):
            config = tuning.candidates("both_products", arch, torch.bfloat16, width)[0]
            assert (config.tile_m, config.tile_n) == predictions._product_tile(width)
