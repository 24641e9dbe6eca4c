"""The command line as a user meets it: exit codes, one-line errors, and every command once for real."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import gapkernels
from gapkernels import environment
from gapkernels.cli import main, split_overrides
from gapkernels.errors import UserError
from gapkernels.training.config import read_config

SMALL = [
    "--data.train_samples=256",
    "--data.test_samples=200",
    "--model.embed_dim=16",
    "--model.encoders.image.width=8",
    "--model.encoders.text.width=16",
    "--model.encoders.text.depth=1",
    "--optim.batch_size=64",
    "--optim.epochs=2",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that `gapkernels train` made."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits", *SMALL, "--methods", "clip-ft,gap", "--seeds", "0,1", "--out", str(folder)]) == 0
    return folder


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end with exit code 2 and exactly one line, and return that line."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gapkernels: error: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err


def test_train_leaves_a_complete_run_folder(run_folder: Path) -> None:
    for method in ("clip-ft", "gap"):
        for seed in (0, 1):
            names = {path.name for path in (run_folder / method / f"seed-{seed}").iterdir()}
            assert names == {"checkpoint.pt", "embeddings.safetensors", "metrics.jsonl", "result.json", "tensorboard"}
    names = {path.name for path in run_folder.iterdir()}
    expected = {"config.yaml", "environment.json", "results.json", "report.html", "plots", "clip-ft", "gap"}
    assert names == expected


def test_train_again_repeats_nothing_and_prints_the_table(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_folder / "gap" / "seed-0" / "checkpoint.pt").stat().st_mtime_ns
    assert main(["train", "digits", *SMALL, "--methods", "gap", "--seeds", "0", "--out", str(run_folder)]) == 0
    captured = capsys.readouterr()
    assert captured.err == "[1/1] gap, seed 0: already finished\n"
    lines = captured.out.splitlines()
    assert lines[0].split()[:2] == ["method", "gap"]
    # The table is about the whole folder, not only about what was asked for this time.
    assert [line.split()[0] for line in lines[2:4]] == ["clip-ft", "gap"]
    assert lines[-1] == f"report: {run_folder / 'report.html'}"
    assert (run_folder / "gap" / "seed-0" / "checkpoint.pt").stat().st_mtime_ns == before


def test_train_is_quiet_without_a_terminal(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per run, no progress bar."""
    folder = run_folder.parent / "second"
    assert main(["train", "digits", *SMALL, "--methods", "gap", "--seeds", "0", "--out", str(folder)]) == 0
    error = capsys.readouterr().err
    assert "\r" not in error
    assert error.startswith("[1/1] gap, seed 0: gap ")
    assert error.count("\n") == 1


def test_report_rebuilds_what_was_deleted(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_folder / "results.json").read_text()
    for name in ("results.json", "report.html"):
        (run_folder / name).unlink()
    assert main(["report", str(run_folder)]) == 0
    assert (run_folder / "results.json").read_text() == before
    assert (run_folder / "report.html").is_file()
    assert "V-measure" in capsys.readouterr().out


def test_report_measures_older_runs_anew(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "older"
    shutil.copytree(run_folder, folder)
    path = folder / "gap" / "seed-1" / "result.json"
    now = json.loads(path.read_text())
    path.write_text(json.dumps(now | {"metrics": {"gap": 1.5}}))
    assert main(["report", str(folder), "--rescore"]) == 0
    assert "gap, seed 1: measured anew" in capsys.readouterr().err
    found = json.loads(path.read_text())
    assert list(found["metrics"]) == list(now["metrics"])
    assert found["metrics"] == pytest.approx(now["metrics"], rel=1e-3, abs=1e-3)
    assert found["seconds"] == now["seconds"]


def test_only_run_folders_are_measured_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rescore is for run folders" in fails(capsys, "report", str(tmp_path / "results.json"), "--rescore")


def test_report_of_several_folders_needs_a_name(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out FILE" in fails(capsys, "report", str(run_folder), str(run_folder))
    page = run_folder.parent / "both.html"
    assert main(["report", str(run_folder), str(run_folder), "--out", str(page)]) == 0
    assert page.is_file()


def test_eval_prints_the_metrics_of_a_checkpoint(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run_folder / "gap" / "seed-0" / "checkpoint.pt"
    assert main(["eval", str(checkpoint), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert main(["eval", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", "value"]
    assert lines[2].split() == ["gap", f"{metrics['gap']:.4f}"]
    result = json.loads((checkpoint.parent / "result.json").read_text())
    assert metrics["gap"] == pytest.approx(result["metrics"]["gap"], rel=1e-3)


def test_eval_reads_embeddings_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.eye(6, dtype=np.float32)
    np.savez(tmp_path / "e.npz", image=image, text=image[::-1].copy())
    assert main(["eval", str(tmp_path / "e.npz"), "--anchor", "text", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["gap"] == 0.0
    assert metrics["image_to_text/R@1"] == 0.0
    assert "v_measure" not in metrics


def test_info_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (gapkernels.__version__, torch.__version__, "backends", "reference", "scikit-learn"):
        assert word in text
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


@pytest.mark.parametrize(
    "words", [["--help"], ["info", "--help"], ["train", "--help"], ["eval", "--help"], ["report", "-h"]]
)
def test_every_command_explains_itself(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert "usage: gapkernels" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"gapkernels {gapkernels.__version__}\n"


def test_print_config_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--optim.lr", "0.5", "--seeds", "4", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "lr: 0.5  # peak learning rate" in text
    assert "seeds: [4]" in text
    assert "stop: 0.7" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("info --jsn", "unknown option --jsn (see gapkernels info --help)"),
        ("info --optim.lr 3", "unknown option --optim.lr (see gapkernels info --help)"),
        ("train", "required: PRESET"),
        ("train digit", "unknown preset 'digit'; did you mean digits?; presets: "),
        ("train digits --overwrit", "unknown option --overwrit (see gapkernels train --help)"),
        ("train digits --optim.lrr 1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("train digits --optim.lr fast", "optim.lr: input should be a valid number"),
        ("train digits --optim.lr", "--optim.lr needs a value"),
        ("train digits --optim.lr --resume", "--optim.lr needs a value"),
        ("train digits --seeds 0,x", "seeds.1: input should be a valid integer"),
        ("train digits --methods gapp", "unknown method 'gapp'; did you mean gap?"),
        ("train digits --config nowhere.yaml", "cannot read the configuration nowhere.yaml"),
        ("train digits --data-dir nowhere", "there is no data folder nowhere"),
        ("train digits --device abacus", "device 'abacus' cannot be used"),
        ("train digits --device meta", "device 'meta' cannot be used"),
        ("train digits --seeds 4294967296", "seeds.0: input should be less than 4294967296"),
        ("train digits --optim.epochs 1" + "0" * 5000, "optim.epochs: unable to parse input string as an integer"),
        ("train digits --name ..", "unknown option --name"),
        ("train digits --optim.lr 2020-13-45", "optim.lr: input should be a valid number"),
        ("train digits --optim.lr " + "[" * 10_000, "optim.lr: input should be a valid number"),
        ("train digits --resume", "nothing to resume: runs/digits holds no run"),
        ("train digits --resume --overwrite", "not allowed with"),
        ("train digits --out .", "is not empty and holds no run"),
        ("train digits --out file.txt", "file.txt is not a folder"),
        ("eval nowhere.pt", "no checkpoint at nowhere.pt"),
        ("eval nowhere.npz", "no embeddings at nowhere.npz"),
        ("eval .", "no checkpoint at checkpoint.pt"),
        ("eval file.txt", "file.txt is damaged or not a checkpoint"),
        ("report .", "is not a run folder: it has no config.yaml"),
        ("report file.json --out file.json", "--out names the HTML file and must end in .html, got file.json"),
        ("report file.json --out file.md", "--out names the HTML file and must end in .html, got file.md"),
        ("report . --out file.txt", "--out names the HTML file and must end in .html, got file.txt"),
        ("reproduce --dataset digits --out .", ". is not empty and holds no experiment; choose another folder"),
        ("reproduce --dataset digits --batch-sizes 9" + "9" * 5000, "--batch-sizes must be whole numbers above 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("mine")
    assert expected in fails(capsys, *words.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("command", [["train", "digits"], ["eval", "x.npz"], ["report", "x"]])
def test_a_missing_package_is_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = environment.package_version
    monkeypatch.setattr(environment, "package_version", lambda name: None if name == "matplotlib" else version(name))
    line = fails(capsys, *command)
    assert f"gapkernels {command[0]} needs matplotlib: pip install 'gapkernels[train]'" in line


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(environment, "describe_environment", broken)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_an_interruption_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from gapkernels.training.loop import Trainer

    def interrupted(trainer: Trainer, label: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupted)
    assert main(["train", "digits", *SMALL, "--out", str(tmp_path / "run")]) == 130
    error = capsys.readouterr().err
    assert error.startswith("gapkernels: interrupted")
    assert "goes on from its last checkpoint" in error
    assert error.count("\n") == 1


def test_a_report_takes_the_place_of_nothing_else(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").mkdir()
    assert "page.html is a folder" in fails(capsys, "report", str(run_folder), "--out", str(tmp_path / "page.html"))
    source = Path(__file__).parents[1] / "benchmarks" / "results"
    result = str(next(source.glob("*.json")))
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "plots").write_text("mine")
    for name in ("notes", "plots"):
        assert "choose another name" in fails(capsys, "report", result, "--out", str(tmp_path / f"{name}.html"))
    assert (tmp_path / "notes.md").read_text() == (tmp_path / "plots").read_text() == "mine"


def test_two_processes_do_not_train_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one says who has the folder; a killed one leaves nothing that stands in the way."""
    folder, command = tmp_path / "run", [sys.executable, "-m", "gapkernels.cli", "train", "digits", *SMALL]
    words = ["--methods", "gap", "--seeds", "0", "--out", str(folder)]
    long = [*command, *words, "--optim.epochs=2000", "--run.log_every=1"]
    with subprocess.Popen(long, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not (folder / "gap" / "seed-0" / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        line = fails(capsys, "train", "digits", *SMALL, "--optim.epochs=2000", "--run.log_every=1", *words)
        assert f"another process trains into {folder} (process {first.pid})" in line
        first.kill()
    assert (folder / ".lock").exists()
    assert main(["train", "digits", *SMALL, *words, "--overwrite"]) == 0
    assert not (folder / ".lock").exists()


def test_features_of_any_modalities_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    names = ["audio", "video", "$x^2$", r"\frac", "<b>", "_f", "g", "h", "depth", "touch"]
    meaning = generator.normal(size=(60, 4))
    arrays = {name: meaning @ generator.normal(size=(4, 6)) + generator.normal(size=(60, 6)) for name in names}
    np.savez(tmp_path / "train.npz", **arrays, labels=np.arange(60) % 3)
    words = ["train", "features", "--data-dir", str(tmp_path), "--data.train_file", "train.npz", "--seeds", "0"]
    words += ["--methods", "gap", "--optim.epochs", "2", "--optim.batch_size", "16", "--run.threads", "1"]
    assert main([*words, "--out", str(tmp_path / "run"), "--model.embed_dim", "1"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<b>" not in page.replace("<b></b>", "")
    assert "&lt;b&gt;" in page
    config = read_config(tmp_path / "run" / "config.yaml")
    assert (config.model.anchor, sorted(config.model.encoders)) == ("$x^2$", sorted(names))
    assert "model.anchor: $x^2$, as no modality is called text" in capsys.readouterr().err
    line = fails(capsys, *words, "--out", str(tmp_path / "other"), "--model.anchor", "vidoe")
    assert "model.anchor is 'vidoe', but the data has" in line
    # The same command finds its own run again.
    assert main([*words, "--out", str(tmp_path / "run"), "--model.embed_dim", "1"]) == 0


def test_a_modality_that_no_module_can_be_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("clip.image", "keys"):
        np.savez(tmp_path / "train.npz", **{name: np.eye(20), "text": np.eye(20)})
        words = ["train", "features", "--data-dir", str(tmp_path), "--data.train_file", "train.npz"]
        line = fails(capsys, *words, "--optim.batch_size", "8", "--out", str(tmp_path / "run"))
        assert "model.encoders: no modality can be called so" in line
        assert name in line
        assert not (tmp_path / "run" / "gap").exists()


def test_settings_are_told_from_options() -> None:
    overrides, others = split_overrides(["train", "digits", "--optim.lr=1e-3", "--a.b", "-1", "--out", "my.folder"])
    assert overrides == {"optim.lr": "1e-3", "a.b": "-1"}
    assert others == ["train", "digits", "--out", "my.folder"]
    with pytest.raises(UserError, match=r"--a\.b needs a value"):
        split_overrides(["--a.b"])


def test_starting_up_loads_no_optional_package() -> None:
    script = "import sys, torch; before = set(sys.modules); import gapkernels.cli; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "gapkernels.cli" in loaded
    optional = {"matplotlib", "sklearn", "tensorboard", "pydantic", "yaml", "PIL", "safetensors", "tqdm", "jinja2"}
    assert optional.isdisjoint(loaded)


def test_the_installed_command_reports_mistakes_the_same_way() -> None:
    command = [sys.executable, "-m", "gapkernels.cli", "train", "digit"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m gapkernels.cli train digits --print-config | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("name: digits")
    assert result.stderr == ""
