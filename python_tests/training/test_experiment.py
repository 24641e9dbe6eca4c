import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gapkernels.errors import UserError
from gapkernels.training.config import Config, read_config
from gapkernels.training.experiment import choose_device, prepare_folder, run_experiment
from gapkernels.training.layout import CHECKPOINT, CONFIG, ENVIRONMENT, RESULT, run_folder

SmallConfig = Callable[..., Config]


@pytest.fixture
def started(small_config: SmallConfig, tmp_path: Path) -> Path:
    """A run folder in which one method has begun, beside a file of the user's."""
    folder = tmp_path / "run"
    prepare_folder(folder, small_config(), "continue")
    run_folder(folder, "gap", 0).mkdir(parents=True)
    (run_folder(folder, "gap", 0) / CHECKPOINT).write_text("a checkpoint")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_finished_runs_are_not_repeated(
    finished: Path, small_config: SmallConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(finished, "gap", 0)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    run_experiment(small_config(seeds=[0], optim__epochs=10), finished, methods=["gap"], device="cpu")
    assert "gap, seed 0: already finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_same_settings_continue_and_seeds_add_up(started: Path, small_config: SmallConfig) -> None:
    prepare_folder(started, small_config(seeds=[9]), "continue")
    assert (run_folder(started, "gap", 0) / CHECKPOINT).exists()
    assert read_config(started / CONFIG).seeds == (0, 1, 2, 9)


def test_other_settings_are_refused_with_both_remedies(started: Path, small_config: SmallConfig) -> None:
    with pytest.raises(UserError, match=r"optim\.lr: 0\.005 there, 0\.1 now.*--out.*--overwrite"):
        prepare_folder(started, small_config(optim__lr=0.1), "continue")
    assert read_config(started / CONFIG) == small_config()


def test_a_run_that_never_began_does_not_stand_in_the_way(small_config: SmallConfig, tmp_path: Path) -> None:
    prepare_folder(tmp_path / "run", small_config(), "continue")
    prepare_folder(tmp_path / "run", small_config(optim__lr=0.1), "continue")
    assert read_config(tmp_path / "run" / CONFIG).optim.lr == 0.1


def test_overwriting_deletes_the_run_and_nothing_else(started: Path, small_config: SmallConfig) -> None:
    prepare_folder(started, small_config(optim__lr=0.1), "overwrite")
    assert sorted(path.name for path in started.iterdir()) == sorted([CONFIG, ENVIRONMENT, "notes.txt"])
    assert read_config(started / CONFIG).optim.lr == 0.1


@pytest.mark.parametrize("existing", ["continue", "overwrite"])
def test_a_folder_with_other_things_is_left_alone(small_config: SmallConfig, tmp_path: Path, existing: str) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no run; choose another folder with --out"):
        prepare_folder(tmp_path, small_config(), existing)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_resuming_needs_a_run(small_config: SmallConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume"):
        prepare_folder(tmp_path / "run", small_config(), "require")


def test_a_damaged_checkpoint_names_the_remedy(small_config: SmallConfig, started: Path) -> None:
    with pytest.raises(UserError, match=r"damaged or not a checkpoint.*delete the folder .*seed-0"):
        run_experiment(small_config(seeds=[0]), started, methods=["gap"], device="cpu")


def test_a_checkpoint_of_another_model_names_the_remedy(small_config: SmallConfig, started: Path) -> None:
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, run_folder(started, "gap", 0) / CHECKPOINT)
    with pytest.raises(UserError, match=r"comes from another version of the trainer; delete the folder .*seed-0"):
        run_experiment(small_config(seeds=[0]), started, methods=["gap"], device="cpu")


def test_a_log_that_lost_lines_is_noticed(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config(seeds=[0], optim__epochs=1)
    run_experiment(config, tmp_path, methods=["clip-ft"], device="cpu")
    run = run_folder(tmp_path, "clip-ft", 0)
    (run / RESULT).unlink()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter than its checkpoint"):
        run_experiment(config, tmp_path, methods=["clip-ft"], device="cpu")


def test_mistakes_are_found_before_anything_is_written(small_config: SmallConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"unknown method 'gapp'; did you mean gap\?; methods: clip-lt, clip-ft, gap"):
        run_experiment(small_config(), folder, methods=["gapp"])
    with pytest.raises(UserError, match=r"optim\.batch_size is 300, but the training split has 256 samples"):
        run_experiment(small_config(optim__batch_size=300), folder)
    with pytest.raises(UserError, match="device 'abacus' cannot be used"):
        run_experiment(small_config(), folder, device="abacus")
    assert not folder.exists()


def test_the_run_records_where_it_ran(finished: Path) -> None:
    environment = json.loads((finished / ENVIRONMENT).read_text())
    assert environment["torch"] == torch.__version__
    assert json.loads((run_folder(finished, "gap", 0) / RESULT).read_text())["device"] == "cpu"


def test_a_device_is_found() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
