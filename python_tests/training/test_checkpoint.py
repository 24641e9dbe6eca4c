import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gapkernels.errors import UserError
from gapkernels.training.checkpoint import (
    atomic_write,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    seed_everything,
    write_text,
)

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()  # noqa: NPY002 (the generator under test)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_sees_a_file_before_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"


def test_what_a_crash_left_behind_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.tmp").write_bytes(b"left by a killed process, longer than the new content")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_one_file_take_turns(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from gapkernels.training.checkpoint import write_text
for _ in range(60):
    write_text(Path(sys.argv[1]), sys.argv[2] * 20_000)
"""
    path = tmp_path / "file"
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", script, str(path), letter])) for letter in "ab"
        ]
        while any(writer.poll() is None for writer in writers):
            if path.exists():
                assert path.read_text() in ("a" * 20_000, "b" * 20_000)
            else:  # they import for seconds
                time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_random_generators_come_back_through_a_checkpoint(tmp_path: Path) -> None:
    seed_everything(3)
    draw()
    save_checkpoint(tmp_path / "c.pt", {"random": random_state(CPU)})
    expected = [draw() for _ in range(3)]
    seed_everything(4)
    restore_random_state(load_checkpoint(tmp_path / "c.pt")["random"], CPU)
    assert [draw() for _ in range(3)] == expected


def test_one_seed_seeds_every_generator() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*c\.pt"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("damage", ["flipped bit", "cut in half", "empty", "text"])
def test_a_damaged_checkpoint_is_never_loaded(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"weights": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1  # in the middle of the weights, where torch.load would not notice
    elif damage == "cut in half":
        del content[len(content) // 2 :]
    else:
        content[:] = b"" if damage == "empty" else b"not a checkpoint"
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or not a checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"state": Path("an object of an arbitrary class")}, path)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(path)
