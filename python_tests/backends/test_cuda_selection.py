"""Where ``backend="auto"`` takes the CUDA kernels: by a recorded measurement, and only once they are compiled."""

import json
from types import SimpleNamespace

import pytest
import torch

from gapkernels import backends
from gapkernels.backends import cuda
from gapkernels.backends.cuda import speed_record
from gapkernels.spec import LossSpec

SOURCE = "benchmarks/results/made-up.json"


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """Hopper and compiled kernels, as far as selection asks; ``hopper(record)`` sets the record."""
    for backend in (backends.triton_backend, cuda):
        monkeypatch.setattr(backend, "unusable_because", lambda device=None, dtype=None: None)
        monkeypatch.setattr(backend, "create", lambda name=backend.__name__: name)
    monkeypatch.setattr(backends.triton_backend, "device_name", lambda: "H100")
    monkeypatch.setattr(cuda, "is_compiled", lambda: True)
    monkeypatch.setattr(speed_record, "RECORD", tmp_path / "speed_record.json")

    def forget():
        for cached in (speed_record.regions, backends._known_of, backends._create):
            cached.cache_clear()

    def record(content):
        speed_record.RECORD.write_text(json.dumps(content))
        forget()

    record({})
    yield record
    forget()


def chosen(samples, width, dtype=torch.bfloat16, device="cuda"):
    """What auto takes, of embeddings that need not exist."""
    like = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=torch.Size((samples, width)))
    backend = backends.select("auto", like, LossSpec())
    return backend.rpartition(".")[2] if isinstance(backend, str) else type(backend).__name__


def statuses():
    return {status.name: status.reason for status in backends.available()}


def region(samples, width):
    return {"samples": samples, "width": width, "source": SOURCE}


def test_record_in_the_package_is_well_formed():
    for dtype, entry in speed_record.regions().items():
        assert getattr(torch, dtype) in cuda.DTYPES
        assert entry.samples > 0 < entry.width
        assert entry.source.startswith("benchmarks/results/")


def test_without_a_measurement_auto_stays_with_triton(hopper):
    assert chosen(32768, 1024) == "triton"
    assert "by name only" in statuses()["cuda"]
    assert statuses()["triton"].endswith("auto's choice there")


@pytest.mark.parametrize(
    ("samples", "width", "dtype", "expected"),
    [
        (4096, 256, torch.bfloat16, "cuda"),
        (32768, 1024, torch.bfloat16, "cuda"),
        (4095, 256, torch.bfloat16, "triton"),
        (4096, 255, torch.bfloat16, "triton"),
        (4096, 256, torch.float16, "triton"),
    ],
)
def test_measured_region_is_taken(hopper, samples, width, dtype, expected):
    hopper({"sm_90": {"bfloat16": region(4096, 256)}, "sm_100": {"float16": region(1, 1)}})
    assert chosen(samples, width, dtype) == expected
    assert statuses()["cuda"].endswith(f"auto's choice for bfloat16 from N = 4096, D = 256 on ({SOURCE})")
    assert statuses()["triton"].endswith("auto's choice there but where cuda is faster")


def test_auto_never_compiles(hopper, monkeypatch):
    hopper({"sm_90": {"bfloat16": region(1, 1)}})
    monkeypatch.setattr(cuda, "is_compiled", lambda: False)
    assert chosen(4096, 512) == "triton"
    assert cuda.BUILD_COMMAND in statuses()["cuda"]
    assert "auto's choice once compiled for bfloat16" in statuses()["cuda"]


def test_auto_where_the_kernels_cannot_run(hopper, monkeypatch):
    hopper({"sm_90": {"bfloat16": region(1, 1)}})
    assert chosen(4096, 512, device="cpu") in ("CpuBackend", "TiledBackend")
    monkeypatch.setattr(cuda, "unusable_because", lambda device=None, dtype=None: "not a Hopper GPU")
    backends._known_of.cache_clear()
    assert chosen(4096, 512) == "triton"
    monkeypatch.setattr(backends.triton_backend, "unusable_because", lambda device=None, dtype=None: "no Triton")
    backends._known_of.cache_clear()
    assert chosen(4096, 512) == "TiledBackend"


def rows(cuda_times, dtype="bfloat16", setting="", triton=1.0, iqr=0.01):
    """Rows of a result file: Triton takes a second, the CUDA kernels ``{(samples, width): seconds}``."""
    shared = {"loss": "gap", "modalities": 2, "backward": True, "dtype": dtype, "iqr": iqr}
    return [
        {**shared, "samples": n, "width": d, "implementation": f"gapkernels-{backend}{setting}", "median": time}
        for (n, d), seconds in cuda_times.items()
        for backend, time in (("cuda", seconds), ("triton", triton))
    ]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({(1024, 128): 0.5, (1024, 512): 0.5}, (1024, 128)),
        ({(1024, 128): 2.0, (1024, 512): 0.5, (4096, 128): 2.0, (4096, 512): 0.5}, (1024, 512)),
        ({(1024, 512): 2.0, (4096, 128): 0.5, (4096, 512): 0.5}, (4096, 128)),
        ({(1024, 512): 2.0, (4096, 128): 2.0, (4096, 512): 0.5}, (4096, 512)),
        ({(1024, 512): 0.5, (4096, 512): 2.0}, None),  # slower where there is more to do: nothing to go by
        ({(1024, 512): 0.995}, None),  # within the spread
        ({}, None),
    ],
)
def test_region_is_derived_from_a_result_file(times, expected):
    found = speed_record.derive(rows(times), SOURCE)
    assert found == ({} if expected is None else {"bfloat16": speed_record.Region(*expected, SOURCE)})


def test_other_settings_and_problems_without_a_rival_do_not_count():
    fast, alone = rows({(4096, 512): 0.5}, setting=":tuned"), rows({(4096, 512): 0.5})[:1]
    assert speed_record.derive([*fast, *alone], SOURCE) == {}


def test_a_size_is_won_if_every_problem_of_it_is():
    lost = [{**row, "modalities": 3} for row in rows({(4096, 512): 2.0})]
    assert speed_record.derive([*rows({(4096, 512): 0.5}), *lost], SOURCE) == {}


def test_command_renews_the_record(hopper, tmp_path, capsys):
    hopper({"sm_90": {"float16": region(1, 1)}})
    file = tmp_path / "speed.json"
    measured = [*rows({(4096, 512): 0.5}), *rows({(4096, 512): 2.0}, dtype="float16")]
    file.write_text(json.dumps({"benchmarks": [{"extra_info": row} for row in measured]}))
    speed_record.main([str(file)])
    assert capsys.readouterr().out == f"bfloat16 from N = 4096, D = 512 on ({file})\n"
    speed_record.regions.cache_clear()
    assert speed_record.regions() == {"bfloat16": speed_record.Region(4096, 512, str(file))}
    file.write_text(json.dumps({"benchmarks": []}))
    speed_record.main([str(file)])
    assert "auto stays with Triton" in capsys.readouterr().out
    assert json.loads(speed_record.RECORD.read_text()) == {}
