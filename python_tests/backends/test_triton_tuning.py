"""What tuning finds is remembered, by this process and for the next."""

import multiprocessing

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gapkernels.backends.triton import tuning
from gapkernels.backends.triton.device import INTERPRETED

if INTERPRETED:
    pytest.skip("nothing is tuned in Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

LIKE = torch.empty(1, 512, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    """A file of one's own on what looks like an H100; the second candidate of each kernel is the fastest."""
    monkeypatch.setenv("GAPKERNELS_TUNING_FILE", str(tmp_path / "tuning" / "file.json"))
    monkeypatch.delenv("GAPKERNELS_TUNE", raising=False)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "_time", lambda launch, config: launch(config))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning.forget()
    yield tmp_path / "tuning" / "file.json"
    tuning.forget()


def choose(kernel, **arguments):
    second = tuning.candidates(kernel, "sm_90", LIKE.dtype, LIKE.shape[1])[1]
    return tuning.choose(kernel, LIKE, lambda config: float(config != second), **arguments), second


def test_without_a_file_the_default_is_taken(file):
    config, _ = choose("tile_sums")
    assert config == tuning.candidates("tile_sums", "sm_90", torch.bfloat16, 512)[0]
    assert not file.exists()


def test_a_process_that_does_not_tune_goes_by_the_file(file, monkeypatch):
    monkeypatch.setenv("GAPKERNELS_TUNE", "1")
    config, second = choose("tile_sums")
    assert config == second
    monkeypatch.delenv("GAPKERNELS_TUNE")
    tuning.forget()  # another process
    assert choose("tile_sums")[0] == second


def test_configurations_that_are_no_longer_candidates_are_not_taken(file, monkeypatch):
    monkeypatch.setenv("GAPKERNELS_TUNE", "1")
    choose("tile_sums")
    monkeypatch.delenv("GAPKERNELS_TUNE")
    file.write_text(file.read_text().replace('"tile_m": 128', '"tile_m": 512'))
    tuning.forget()
    assert choose("tile_sums")[0].tile_m == 128
    file.write_text(file.read_text().replace('"tile_m"', '"name of another version"'))
    tuning.forget()
    assert choose("tile_sums")[0].tile_m == 128


def test_what_launches_add_to_is_restored(monkeypatch):
    monkeypatch.setenv("GAPKERNELS_TUNE", "1")
    totals = torch.ones(3), torch.ones(2)

    def launch(config):
        for total in totals:
            total += 1
        return 0.0

    tuning.choose("both_products", LIKE, launch, reset=totals)
    assert all(torch.equal(total, torch.ones_like(total)) for total in totals)


def write_one(number, barrier):
    barrier.wait()
    for place in range(10):
        tuning._write({f"{number}/{place}": tuning.INTERPRETER})


def test_processes_that_write_at_one_time_lose_nothing():
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    writers = [context.Process(target=write_one, args=(number, barrier)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(tuning._read()) == 40
