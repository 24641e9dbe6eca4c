"""Figures of an experiment: the final metrics side by side, curves over training, and the joint space.

Each figure is small enough to be read on a phone. Methods and modalities differ in line style or
marker as well as in colour, and classes carry their names: no figure depends on telling colours apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gapkernels.errors import UserError, printable
from gapkernels.reporting.figures import COLORS, DPI, LINES, MARKERS, WIDTH, Plot, finish, new_figure, plain_text
from gapkernels.training.embeddings import NO_CLASS, read_embeddings
from gapkernels.training.layout import EMBEDDINGS, RESULT
from gapkernels.training.paper import paper_results
from gapkernels.training.results import Experiment, RunResult, Statistic, costs, summarise, table_columns

# M. A. Petroff, "Accessible Color Sequences for Data Visualization", 2021.
_CLASS_COLORS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
_OTHER_CLASSES = "#d0d0d0"

_MOST_POINTS = 1500
_MOST_PIXELS = 50_000  # of a side; what draws them takes fewer than 2^16
_LONGEST_LABEL = 48
_LONGEST_FILE_NAME = 100
_SMALLEST_SPAN = 0.05  # of a metric's axis: differences of a tenth of a percent shall not look like anything

_COSTS = {
    "epoch_seconds": "time of an epoch (s)",
    "epoch_cpu_seconds": "processor time of an epoch (s)",
    "peak_mib": "peak memory of training (MiB)",
}


def draw_plots(experiment: Experiment) -> list[Plot]:
    """Draw every figure the experiment has data for."""
    with plain_text():
        return _draw_plots(experiment)


def _draw_plots(experiment: Experiment) -> list[Plot]:
    methods = experiment.methods
    plots = [
        _draw_summary(experiment),
        *_draw_gap_against_grouping(experiment),
        *_draw_curves(methods, "test", "gap", "modality gap", "Distance between the means of the modalities"),
        *_draw_curves(methods, "test", "v_measure", "V-measure", "Agreement of k-means clusters with the classes"),
        *_draw_curves(methods, "test", "true_pair_cosine", "cosine of true pairs", "Mean cosine of matching samples"),
        *_draw_curves(methods, "train", "info_nce", "InfoNCE (nats)", "The contrastive term"),
    ]
    if any(experiment.config.methods[method].learn_temperature for method in methods):
        plots += _draw_curves(
            methods, "train", "logit_scale", "logit scale (1 / temperature)", "Sharpness of the soft-max"
        )
    for method, runs in methods.items():
        plots += _draw_gap_terms(method, runs)
    for method, runs in methods.items():
        plots += _draw_space(method, runs[0])
    return plots


def _draw_summary(experiment: Experiment) -> Plot:
    """Draw the metrics of the results table: a row per metric with a scale of its own, a marker per method."""
    summary = summarise(experiment)
    columns = table_columns(next(iter(summary.values())))
    height = 0.2 + len(columns) * (0.45 + 0.17 * len(summary))
    figure = Figure(figsize=(WIDTH, height), dpi=min(DPI, _MOST_PIXELS / height), layout="constrained")
    for axes, (key, heading) in zip(figure.subplots(len(columns), squeeze=False)[:, 0], columns.items(), strict=True):
        for number, metrics in enumerate(summary.values()):
            axes.errorbar(
                metrics[key].mean,
                -number,
                xerr=metrics[key].std,
                capsize=3,
                markersize=6,
                marker=MARKERS[number % len(MARKERS)],
                color=COLORS[number % len(COLORS)],
            )
        axes.set_yticks([-number for number in range(len(summary))], list(summary))
        axes.set_ylim(0.3 - len(summary), 0.7)
        axes.margins(x=0.15)
        lowest, highest = axes.get_xlim()
        missing = max(0.0, _SMALLEST_SPAN - (highest - lowest))
        axes.set_xlim(lowest - missing / 2, highest + missing / 2)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(_label(heading), fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    return finish(
        figure, "Results", "summary", "Final metrics on the test split: mean over seeds, bar: ± standard deviation."
    )


def _draw_gap_against_grouping(experiment: Experiment) -> list[Plot]:
    """Draw each run as a point of modality gap and V-measure, with the paper's results where it has any."""
    methods, paper = experiment.methods, paper_results(experiment.config.data.dataset)
    if not all("v_measure" in run.metrics for run in experiment.runs):
        return []
    figure, axes = _new_curves("V-measure")
    axes.set_xlabel("modality gap")
    for number, (method, runs) in enumerate(methods.items()):
        style: dict[str, Any] = {
            "marker": MARKERS[number % len(MARKERS)],
            "color": COLORS[number % len(COLORS)],
            "linestyle": "none",
        }
        points = [(run.metrics["gap"], run.metrics["v_measure"]) for run in runs]
        axes.plot(*zip(*points, strict=True), **style, label=method)
        if method in paper:
            published = paper[method]
            axes.plot(published["gap"], published["v_measure"], **style, fillstyle="none", label=f"{method} (paper)")
    axes.legend(frameon=False)
    caption = "Gap and grouping of every run on the test split; upper left is better."
    return [finish(figure, "Results", "gap-against-v-measure", caption)]


def draw_comparison(experiments: Sequence[Experiment]) -> list[Plot]:
    """Draw the metrics of the results table against the batch size, if the experiments differ in it."""
    with plain_text():
        return _draw_comparison(experiments)


def _draw_comparison(experiments: Sequence[Experiment]) -> list[Plot]:
    ordered = sorted(experiments, key=lambda experiment: experiment.config.optim.batch_size)
    sizes = [experiment.config.optim.batch_size for experiment in ordered]
    if len(set(sizes)) < 2:
        return []
    summaries = [_with_costs(experiment) for experiment in ordered]
    columns = table_columns(next(iter(summaries[0].values())))
    columns |= {key: heading for key, heading in _COSTS.items() if any(key in m for s in summaries for m in s.values())}
    plots = []
    for key, heading in columns.items():
        figure, axes = _new_curves(heading)
        axes.set_xlabel("batch size")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, list(map(str, sizes)))
        axes.minorticks_off()
        for number, method in enumerate(dict.fromkeys(method for summary in summaries for method in summary)):
            found = [
                (size, summary[method][key])
                for size, summary in zip(sizes, summaries, strict=True)
                if key in summary.get(method, {})
            ]
            if not found:
                continue
            axes.errorbar(
                [size for size, _ in found],
                [statistic.mean for _, statistic in found],
                yerr=[statistic.std or 0.0 for _, statistic in found],
                capsize=3,
                marker=MARKERS[number % len(MARKERS)],
                color=COLORS[number % len(COLORS)],
                linestyle=LINES[number % len(LINES)],
                label=method,
            )
        if key in _COSTS:
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        name = f"batch-size-{re.sub(r'[^A-Za-z0-9_.-]', '-', key)[:_LONGEST_FILE_NAME]}"
        plots.append(finish(figure, "Batch size", name, f"{heading}: mean over seeds, bar: ± standard deviation."))
    return plots


def _with_costs(experiment: Experiment) -> dict[str, dict[str, Statistic]]:
    """Return each metric's statistic by method, and those of what training cost."""
    return {
        method: {
            **metrics,
            **{key: Statistic.of(values) for key, values in costs(experiment.methods[method]).items()},
        }
        for method, metrics in summarise(experiment).items()
    }


def _draw_curves(methods: Mapping[str, Sequence[RunResult]], split: str, key: str, label: str, what: str) -> list[Plot]:
    """Draw one quantity over training, a line per method that recorded it."""
    figure, axes = _new_curves(label)
    for number, (method, runs) in enumerate(methods.items()):
        _draw_line(axes, runs, split, key, method, number)
    if not axes.lines:
        return []
    axes.legend(frameon=False)
    where = "the test split" if split == "test" else "the training batches"
    caption = f"{what}, on {where}; mean over seeds, band: ± standard deviation."
    return [finish(figure, "Over training", key, caption)]


def _draw_gap_terms(method: str, runs: Sequence[RunResult]) -> list[Plot]:
    """Draw the terms that close the gap, and their weights, for a method that has any."""
    terms = {
        "align true pairs": ("align_true_pairs", "atp_weight"),
        "centroid uniformity": ("centroid_uniformity", "cu_weight"),
    }
    used = {name: keys for name, keys in terms.items() if any(record.get(keys[1]) for record in runs[0].history)}
    plots = []
    for index, (kind, label) in enumerate({"terms": "value of the term", "weights": "weight of the term"}.items()):
        if not used:
            continue
        figure, axes = _new_curves(label)
        for number, (name, keys) in enumerate(used.items()):
            _draw_line(axes, runs, "train", keys[index], name, number)
        axes.legend(frameon=False)
        caption = f"{method}: {label}, on the training batches. A term whose weight is 0 is not computed."
        plots.append(finish(figure, "Over training", f"{kind}-{method}", caption))
    return plots


def _draw_space(method: str, run: RunResult) -> list[Plot]:
    """Draw the joint space of one run along its two main directions, by modality and by class."""
    from sklearn.decomposition import PCA

    path = run.folder / EMBEDDINGS
    embeddings = read_embeddings(path)
    highest = -1 if embeddings.labels is None else int(embeddings.labels.max())
    if highest >= len(run.class_names):
        raise UserError(f"{path}: `labels` holds class {highest}, but {RESULT} names {len(run.class_names)} classes")
    arrays = {name: values.float().numpy() for name, values in embeddings.modalities.items()}
    units = {name: a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12) for name, a in arrays.items()}
    rows = np.concatenate(list(units.values()))
    directions = min(2, *rows.shape)
    with np.errstate(all="ignore"):  # embeddings that are all the same vary in no direction
        pca = PCA(n_components=directions, random_state=0).fit(rows)
    # A space of one dimension is drawn as a line.
    clouds = {
        name: np.pad(pca.transform(values)[:_MOST_POINTS], [(0, 0), (0, 2 - directions)])
        for name, values in units.items()
    }

    shares = [*np.nan_to_num(pca.explained_variance_ratio_), 0.0][:2]

    plots = []
    for grouping in ("modality", "class"):
        figure, axes = new_figure()
        if grouping == "modality":
            _draw_by_modality(axes, clouds)
        elif embeddings.labels is None or not (embeddings.labels != NO_CLASS).any():
            continue
        else:
            _draw_by_class(axes, clouds, embeddings.labels.numpy()[:_MOST_POINTS], run.class_names)
        for axis, share in zip("xy", shares, strict=True):
            name = f"principal component {'xy'.index(axis) + 1} ({100 * share:.0f} % of variance)"
            axes.set(**{f"{axis}label": name})
        axes.set_aspect("equal", adjustable="datalim")
        caption = f"{method}, by {grouping}: unit vectors of the test split, seed {run.seed}."
        plots.append(finish(figure, "The joint space", f"space-{method}-by-{grouping}", caption))
    return plots


def _draw_by_modality(axes: Axes, clouds: Mapping[str, np.ndarray]) -> None:
    # The modality with the fewest distinct points goes on top: ten class names would vanish under a cloud of images.
    order = sorted(clouds, key=lambda name: -len(np.unique(clouds[name].round(3), axis=0)))
    for number, name in enumerate(order):
        distinct = np.unique(clouds[name].round(3), axis=0)
        few = len(distinct) < 50
        axes.scatter(
            distinct[:, 0],
            distinct[:, 1],
            s=60 if few else 12,
            alpha=1.0 if few else 0.5,
            marker=MARKERS[number % len(MARKERS)],
            color=COLORS[number % len(COLORS)],
            edgecolors="white" if few else "none",
            linewidths=0.8,
            label=_label(name),
            zorder=2 + number,
        )
    axes.legend(frameon=True, framealpha=0.9)


def _draw_by_class(axes: Axes, clouds: Mapping[str, np.ndarray], labels: np.ndarray, names: Sequence[str]) -> None:
    """Colour the most frequent classes and write each one's name at its median; the other classes are grey.

    The median is that of the modality with the most distinct points: where modalities lie apart, a name between them
    would be near no point of its class.
    """
    classes, counts = np.unique(labels[labels != NO_CLASS], return_counts=True)
    named = classes[np.argsort(-counts, kind="stable")][: len(_CLASS_COLORS)]
    color_of = {label: _CLASS_COLORS[number] for number, label in enumerate(sorted(named))}
    colors = [color_of.get(label, _OTHER_CLASSES) for label in labels]
    for number, (modality, points) in enumerate(clouds.items()):
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=12,
            alpha=0.6,
            marker=MARKERS[number % len(MARKERS)],
            c=colors,
            edgecolors="none",
        )
        axes.scatter([], [], s=20, marker=MARKERS[number % len(MARKERS)], color="#555555", label=_label(modality))
    axes.legend(frameon=True, framealpha=0.9)
    largest = max(clouds.values(), key=lambda points: len(np.unique(points.round(3), axis=0)))
    for label in named:
        x, y = np.median(largest[labels == label], axis=0)
        halo = [patheffects.withStroke(linewidth=3, foreground="white")]
        axes.text(x, y, _label(names[label]), ha="center", va="center", fontsize=10, weight="bold", path_effects=halo)


def _draw_line(axes: Axes, runs: Sequence[RunResult], split: str, key: str, label: str, number: int) -> None:
    """Draw the mean over runs of one quantity, and a band of one standard deviation."""
    epochs, values = _history(runs, split, key)
    if not len(epochs):
        return
    mean = values.mean(axis=0)
    color = COLORS[number % len(COLORS)]
    axes.plot(epochs, mean, color=color, linestyle=LINES[number % len(LINES)], linewidth=1.8, label=label)
    if len(runs) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)


def _history(runs: Sequence[RunResult], split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs at which every run recorded a quantity, [T], and its values there, [runs, T]."""
    series = [_series(run.history, split, key) for run in runs]
    epochs = sorted(set.intersection(*(set(values) for values in series)))
    return np.array(epochs), np.array([[values[epoch] for epoch in epochs] for values in series])


def _series(history: Iterable[Mapping[str, Any]], split: str, key: str) -> dict[float, float]:
    return {record["epoch"]: record[key] for record in history if record["split"] == split and key in record}


def _new_curves(label: str) -> tuple[Figure, Axes]:
    figure, axes = new_figure()
    axes.set_xlabel("epoch")
    axes.set_ylabel(_label(label))
    axes.grid(alpha=0.3)
    return figure, axes


def _label(text: str) -> str:
    """Return a name from outside as a figure can show it: on one line, short, and in the legend.

    matplotlib leaves names out of a legend that begin with an underscore.
    """
    text = printable(text)
    text = text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"
    return f" {text}" if text.startswith("_") else text
