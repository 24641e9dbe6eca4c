"""The paper's results, to be shown beside ours."""

from __future__ import annotations

from importlib import resources

import yaml


def paper_results(dataset: str) -> dict[str, dict[str, float]]:
    """Return the paper's metrics by method, none for a data set that is not in the paper.

    Source:
        Grassucci et al., "Closing the Modality Gap Aligns Group-Wise Semantics", ICLR 2026, arXiv 2601.18525.
    """
    text = (resources.files("gapkernels.training") / "paper.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text).get(dataset, {})
