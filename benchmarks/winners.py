"""Who computes a problem fastest, from the rows of several settings. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DEFAULT = "default"
PROBLEM = ("loss", "samples", "width", "dtype", "modalities", "backward")


def fastest(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every problem who computes it fastest, by how much, and what the others take.

    Args:
        rows: measured rows with ``setting``.

    Returns:
        Of each problem the fastest row, the gain over the best of the default setting (None without one), and under
        ``others`` the remaining times in seconds, fastest first, by "implementation setting".
    """
    best = []
    for problem in dict.fromkeys(tuple(row[name] for name in PROBLEM) for row in rows):
        tried = sorted(
            (row for row in rows if tuple(row[name] for name in PROBLEM) == problem), key=lambda row: row["median"]
        )
        first, *others = tried
        default = min((row["median"] for row in tried if row["setting"] == DEFAULT), default=None)
        best.append(
            {
                **dict(zip(PROBLEM, problem, strict=True)),
                **{name: first[name] for name in ("implementation", "setting", "median", "iqr", "utilisation")},
                "gradient_error": first["gradient_error"],
                "speedup_over_default": default / first["median"] if default else None,
                "others": {f"{row['implementation']} {row['setting']}": row["median"] for row in others},
            }
        )
    return best


def lines(best: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short table of them: problem, winner and its time, gain over the default, and everybody else's time."""
    table = []
    for entry in best:
        problem = f"{entry['loss']} N={entry['samples']} D={entry['width']} {entry['dtype']}"
        gain = entry["speedup_over_default"]
        compared = f"{gain:.2f}× the default" if gain else "no default"
        others = ", ".join(f"{_short(name)} {seconds * 1e3:.4g}" for name, seconds in entry["others"].items())
        table.append(
            f"{problem:34} {_short(entry['implementation']):7} {entry['setting']:10} {entry['median'] * 1e3:9.4g} ms  "
            f"utilisation {entry['utilisation']:.2f}  {compared}" + (f"  ({others})" if others else "")
        )
    return table


def _short(name: str) -> str:
    return name.removeprefix("gapkernels-")
