import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkernels.errors import UserError
from gapkernels.training.config import Config, load_config, read_config
from gapkernels.training.device import choose_device
from gapkernels.training.experiment import prepare_folder, run_experiment
from gapkernels.training.layout import CHECKPOINT, CONFIG, ENVIRONMENT, RESULT, run_folder
from gapkernels.training.report import write_report
from gapkernels.training.results import load_experiment

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


def test_what_other_settings_left_is_not_this_run(small_config: SmallConfig, tmp_path: Path) -> None:
    """A checkpoint, or a result, of another method, seed or learning rate is refused, whatever the folder says."""
    config = small_config(seeds=[0, 1], optim__epochs=1)
    run_experiment(config, tmp_path / "a", methods=["gap", "clip-ft"], device="cpu")
    run_experiment(
        config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 0.02})}),
        tmp_path / "b",
        methods=["gap"],
        device="cpu",
    )
    here = run_folder(tmp_path / "a", "gap", 0)
    for source, words in (
        (run_folder(tmp_path / "a", "clip-ft", 0), "method 'clip-ft', seed 0"),
        (run_folder(tmp_path / "a", "gap", 1), "method 'gap', seed 1"),
        (run_folder(tmp_path / "b", "gap", 0), r"other settings \(optim\.lr: 0\.02 there, 0\.005 now\)"),
    ):
        shutil.rmtree(here)
        shutil.copytree(source, here)
        with pytest.raises(UserError, match=words):
            run_experiment(config, tmp_path / "a", methods=["gap"], device="cpu")
        with pytest.raises(UserError, match=words):
            load_experiment(tmp_path / "a")
        (here / RESULT).unlink()
        with pytest.raises(UserError, match=f"is not of this run.*{words}.*delete the folder"):
            run_experiment(config, tmp_path / "a", methods=["gap"], device="cpu", existing="require")
        assert not (here / RESULT).exists()


@pytest.mark.parametrize("finished_first", [True, False])
def test_a_training_file_that_has_changed_is_noticed(tmp_path: Path, finished_first: bool) -> None:
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=(40, 5)) for name in ("image", "text")}
    np.savez(tmp_path / "train.npz", **arrays)
    overrides = {"data.train_file": "train.npz", "optim.batch_size": 16, "optim.epochs": 1, "model.embed_dim": 4}
    config = load_config("features", overrides={**overrides, "seeds": [0], "run.threads": 1})
    run_experiment(config, tmp_path / "run", methods=["gap"], data_dir=tmp_path, device="cpu")
    if not finished_first:
        (run_folder(tmp_path / "run", "gap", 0) / RESULT).unlink()
    arrays["text"][17, 2] += 1e-9
    np.savez(tmp_path / "train.npz", **arrays)
    words = "was trained and tested on other data" if finished_first else "the data has changed since it was written"
    with pytest.raises(UserError, match=words):
        run_experiment(config, tmp_path / "run", methods=["gap"], data_dir=tmp_path, device="cpu")


def test_the_environment_of_finished_runs_stays(small_config: SmallConfig, tmp_path: Path) -> None:
    config = small_config(seeds=[0], optim__epochs=1)
    run_experiment(config, tmp_path, methods=["gap"], device="cpu")
    elsewhere = json.loads((tmp_path / ENVIRONMENT).read_text()) | {"platform": "elsewhere"}
    (tmp_path / ENVIRONMENT).write_text(json.dumps(elsewhere))
    run_experiment(config, tmp_path, methods=["gap"], device="cpu")
    run_experiment(config.model_copy(update={"seeds": (1,)}), tmp_path, methods=["gap"], device="cpu")
    assert json.loads((tmp_path / ENVIRONMENT).read_text()) == elsewhere
    result = json.loads((run_folder(tmp_path, "gap", 1) / RESULT).read_text())
    assert result["environment"]["platform"] != "elsewhere"
    write_report([load_experiment(tmp_path)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "elsewhere" in page
    assert result["environment"]["platform"] in page
    run_experiment(config, tmp_path, methods=["gap"], device="cpu", existing="overwrite")
    assert json.loads((tmp_path / ENVIRONMENT).read_text())["platform"] == result["environment"]["platform"]


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
