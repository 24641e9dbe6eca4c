"""Where the real data sets are, for the tests that use them where they exist."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]


def real_data(*folders: str) -> Path:
    """Return the folder with data sets, or skip the test: $GAPKERNELS_DATA, else shared/data beside the repository."""
    folder = Path(os.environ.get("GAPKERNELS_DATA", _ROOT.parent / "shared" / "data"))
    missing = [name for name in folders if not (folder / name).is_dir()]
    if missing:
        pytest.skip(f"no real data: {', '.join(missing)} not found (set GAPKERNELS_DATA to the folder that holds them)")
    return folder
