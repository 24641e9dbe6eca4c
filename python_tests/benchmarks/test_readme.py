"""README shows the numbers of the committed result files, and no others."""

from __future__ import annotations

import re

import pytest

from benchmarks import readme


def test_block_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n"
    assert readme.replace_block(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="no <!-- speed:begin -->"):
        readme.replace_block("no markers", "new")


def test_readme_matches_the_result_files() -> None:
    text = readme.README.read_text(encoding="utf-8")
    paths = readme.result_files()
    assert paths, "no result files are committed"
    devices = readme.latest_of_each_device(paths)
    assert readme.replace_block(text, readme.block(devices)) == text, "run: python -m benchmarks.readme"
    assert readme.replace_block(text, readme.digits_block(), readme.DIGITS) == text, "run: python -m benchmarks.readme"
    shown = set(re.findall(r"docs/images/(speed-[^\"]+\.png)", text))
    assert shown == {path.name for path in readme.IMAGES.glob("speed-*.png")}
    assert len(shown) >= len(devices)
