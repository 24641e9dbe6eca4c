import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import gapkernels
from gapkernels import environment
from gapkernels.errors import UserError


def test_versions_devices_backends_and_packages_are_described() -> None:
    description = environment.describe_environment()
    assert description["gapkernels"] == gapkernels.__version__
    assert description["torch"] == torch.__version__
    assert description["devices"][0]["name"] == "cpu"
    assert len(description["devices"]) >= 1 + torch.cuda.device_count()
    backends = {entry["name"]: entry for entry in description["backends"]}
    assert backends["reference"]["usable"]
    assert backends["torch"]["usable"]
    packages = {entry["name"]: entry for entry in description["packages"]}
    assert packages["scikit-learn"]["extra"] == "metrics"
    assert packages["matplotlib"]["extra"] == "train"
    assert packages["triton"]["extra"] == "triton"
    assert json.loads(json.dumps(description)) == description


def test_what_cannot_be_used_says_why_and_what_is_missing_how_to_install_it() -> None:
    description = environment.describe_environment() | {
        "triton": None,
        "backends": [{"name": "cuda", "usable": False, "reason": "no CUDA device"}],
        "packages": [
            {"name": "matplotlib", "version": None, "extra": "train"},
            {"name": "tqdm", "version": "4.66", "extra": "train"},
        ],
    }
    lines = [line.split(maxsplit=1) for line in environment.format_environment(description).splitlines() if line]
    assert ["triton", "none"] in lines
    assert ["cuda", "not usable: no CUDA device"] in lines
    assert ["matplotlib", "missing: pip install 'gapkernels[train]'"] in lines
    assert ["tqdm", "4.66"] in lines


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.require("train", "this test")
    version = environment.package_version
    monkeypatch.setattr(environment, "package_version", lambda name: None if name == "scikit-learn" else version(name))
    # scikit-learn comes to `train` through another extra of ours.
    with pytest.raises(UserError, match=r"this test needs scikit-learn: pip install 'gapkernels\[train\]'"):
        environment.require("train", "this test")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no TOML")
def test_a_checkout_that_is_not_installed_declares_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {extra: set(environment._requirements(extra)) for extra in environment.EXTRAS}
    assert {"pydantic", "scikit-learn"} <= installed["train"]

    def not_installed(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    assert {extra: set(environment._requirements(extra)) for extra in environment.EXTRAS} == installed
    environment.require("train", "this test")
    version = environment.package_version
    monkeypatch.setattr(environment, "package_version", lambda name: None if name == "pydantic" else version(name))
    with pytest.raises(UserError, match="this test needs pydantic: "):
        environment.require("train", "this test")


def test_a_folder_without_project_file_declares_nothing(tmp_path: Path) -> None:
    assert environment._requirements_of_checkout(tmp_path / "pyproject.toml") == []


def test_source_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outside a checkout, also in a folder of somebody else's repository, it is what a variable says."""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    source = tmp_path / "gapkernels" / "environment.py"
    source.parent.mkdir()
    source.touch()
    monkeypatch.setattr(environment, "__file__", str(source))
    monkeypatch.delenv("GAPKERNELS_COMMIT", raising=False)
    assert environment.source_commit() is None
    monkeypatch.setenv("GAPKERNELS_COMMIT", "0123456789ab")
    assert environment.source_commit() == "0123456789ab"
    git("init", "--quiet")
    git("add", "gapkernels")
    git("commit", "--quiet", "-m", "first")
    head = git("rev-parse", "HEAD")[:12]
    assert environment.source_commit() == head
    source.write_text("changed")
    assert environment.source_commit() == f"{head}+dirty"
    assert environment.source_commit("README.md") == head
