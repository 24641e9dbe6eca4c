"""Whatever lies in a file, reading it ends in a typed value or in one line that names the place."""

import contextlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hostile import FUZZ, VALUES, one_line, spoiled
from hypothesis import given, settings
from hypothesis import strategies as st
from training.data_files import write_cifar_jpegs, write_coco, write_mnist, write_spoken_digits

from gapkernels.errors import UserError
from gapkernels.training.checkpoint import load_checkpoint
from gapkernels.training.config import Config, describe_config, dump_config, load_config, read_config
from gapkernels.training.data import AVMNISTData, CIFAR10Data, COCOData, FeaturesData, load_dataset
from gapkernels.training.embeddings import read_embeddings
from gapkernels.training.evaluation import evaluate_file
from gapkernels.training.layout import CHECKPOINT, CONFIG, ENVIRONMENT, METRICS, RESULT, run_folder
from gapkernels.training.loop import Trainer
from gapkernels.training.plots import draw_plots
from gapkernels.training.report import write_report
from gapkernels.training.results import experiment_content, format_table, load_experiment, summarise, table_rows

CPU = torch.device("cpu")
SmallConfig = Callable[..., Config]


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Put other content into a file for as long as the block lasts."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished experiment with one run of each method."""
    folder = tmp_path_factory.mktemp("border") / "run"
    shutil.copytree(finished, folder)
    for method in ("clip-lt", "gap"):
        shutil.rmtree(run_folder(folder, method, 1))
    return folder


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


# The run folder


def tables(folder: Path) -> None:
    experiment = load_experiment(folder)
    text = format_table(table_rows(summarise(experiment)))
    assert len(text.splitlines()) == 4
    json.dumps(experiment_content(experiment), allow_nan=False)


@pytest.mark.parametrize("name", [RESULT, ENVIRONMENT, METRICS])
@FUZZ
@given(data=st.data())
def test_any_value_in_a_run_folder_is_read_or_named(run: Path, name: str, data: st.DataObject) -> None:
    path = run / name if name == ENVIRONMENT else run_folder(run, "gap", 0) / name
    if name == METRICS:
        lines = path.read_bytes().splitlines()
        number = data.draw(st.integers(0, len(lines) - 1))
        lines[number] = json_bytes(data.draw(spoiled(json.loads(lines[number]))))
        content = b"\n".join(lines)
    else:
        content = json_bytes(data.draw(spoiled(json.loads(path.read_bytes()))))
    with changed(path, content):
        try:
            tables(run)
        except UserError as error:
            one_line(error, name, "does not belong there", "embeddings.safetensors")


@settings(FUZZ, max_examples=3)
@given(
    names=st.lists(
        st.text(max_size=30) | st.sampled_from(["$", "$\\frac", "_x", "<b>", "a\nb", "x" * 999]), min_size=10
    )
)
def test_class_names_of_any_kind_are_drawn(run: Path, names: list[str]) -> None:
    path = run_folder(run, "gap", 0) / RESULT
    result = json.loads(path.read_bytes())
    with changed(path, json_bytes({**result, "class_names": names})):
        experiment = load_experiment(run)
        assert draw_plots(experiment)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (RESULT, "[]", "result.json: input should be an object"),
        (RESULT, "{}", "result.json: method is missing"),
        (RESULT, {"metrics": {"gap": float("nan")}}, "metrics.gap: input should be a finite number, got nan"),
        (RESULT, {"metrics": {"gap": 1e308}}, "metrics.gap: input should be less than or equal to"),
        (RESULT, {"metrics": {"v_measure": 1.0}}, "metrics: must hold `gap`"),
        (RESULT, {"metrics": {"gap": 1.0}}, "must hold the same metrics; only one of them has"),
        (RESULT, {"metrics": {"gap": True}}, "metrics.gap: input should be a valid number, got True"),
        (RESULT, {"method": "clip-lt"}, "does not belong there: it is the result of method 'clip-lt', seed 0"),
        (RESULT, {"seed": 1}, "does not belong there"),
        (RESULT, {"class_names": ["one"]}, "`labels` holds class 9, but result.json names 1 classes"),
        (RESULT, "[" * 100_000, "result.json is damaged"),
        (METRICS, "[1, 2]\n", "metrics.jsonl, line 1: input should be an object"),
        (METRICS, '{"split": "test", "step": 0, "epoch": 0, "gap": NaN}\n', "line 1: gap: input should be a finite"),
        (METRICS, '{"split": "test", "step": 0}\n', "line 1: epoch is missing"),
        (ENVIRONMENT, "{}", "environment.json: gapkernels is missing"),
        (ENVIRONMENT, "nonsense", "environment.json is damaged"),
        (CONFIG, "[" * 100_000, "nested too deeply"),
        (CONFIG, "- 1", "must hold a mapping of settings"),
        (CONFIG, "name: 2020-13-45", "is not valid YAML"),
    ],
)
def test_a_wrong_file_in_a_run_folder_is_one_line(
    run: Path, tmp_path: Path, name: str, content: Any, words: str
) -> None:
    path = run_folder(run, "gap", 0) / name if name in (RESULT, METRICS) else run / name
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_bytes()), **content})
    with changed(path, content.encode()), pytest.raises(UserError) as caught:
        write_report([load_experiment(run)], tmp_path / "report.html")
    one_line(caught.value)
    assert words in str(caught.value)


# Settings


@pytest.mark.parametrize("preset", ["digits", "av-mnist", "mscoco", "features", "cifar10"])
@FUZZ
@given(data=st.data())
def test_any_value_in_a_configuration_is_read_or_named(tmp_path: Path, preset: str, data: st.DataObject) -> None:
    tree = data.draw(spoiled(yaml.safe_load(dump_config(load_config(preset)))))
    path = tmp_path / "config.yaml"
    try:
        path.write_text(yaml.safe_dump(tree))
    except (ValueError, yaml.YAMLError):  # a number of too many digits
        return
    try:
        config = read_config(path)
    except UserError as error:
        one_line(error)
    else:
        path.write_text(describe_config(config))
        assert read_config(path) == config
        assert config.name.strip(".")


@pytest.mark.parametrize("name", ["\x1f", " ", "0", '"', ">", "@", "null", "a: b", "x" * 300])
def test_a_described_configuration_keeps_every_name(tmp_path: Path, name: str) -> None:
    tree = yaml.safe_load(dump_config(load_config("features")))
    tree["model"]["encoders"] = {name: {}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = read_config(path)
    path.write_text(describe_config(config))
    assert read_config(path) == config


@FUZZ
@given(
    key=st.sampled_from(
        sorted({"optim.lr", "seeds", "name", "model.encoders.image", "methods.gap", "run.threads", "data"})
    ),
    value=VALUES,
)
def test_any_setting_on_the_command_line_is_taken_or_named(key: str, value: Any) -> None:
    refused_in_one_line(lambda: load_config("digits", overrides={key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("seeds", [seed]) for seed in (-1, 2**32, 10**30)),
        ("seeds", []),
        *(("run.threads", threads) for threads in (0, 100_000)),
        ("optim.epochs", 10**30),
        ("optim.batch_size", 2**40),
        *(("optim.lr", rate) for rate in (float("inf"), float("nan"), 1e300, 0)),
        ("optim.grad_clip", float("inf")),
        ("model.embed_dim", 10**9),
        ("model.encoders.image.width", 10**6),
        ("model.encoders.image.depth", 1000),
        *(("methods.gap.temperature", temperature) for temperature in (0, 1e-300, 1e300, float("nan"))),
        *(("methods.clip-lt.temperature", temperature) for temperature in (0.009, 1.5)),
        *(("methods.gap.cu", weight) for weight in (float("inf"), -1, 1e30)),
        ("methods.gap.uniformity_t", 1e30),
        *(("name", name) for name in (".", "..", "...", "a/b", "", "x" * 1000, "a\nb")),
        ("methods.plots.temperature", 0.1),
        ("data.train_samples", 0),
        ("run.log_every", 10**30),
    ],
)
def test_a_setting_out_of_range_is_named(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_config("digits", overrides={key: value})
    one_line(caught.value)
    assert key.split(".")[0] in str(caught.value)


def test_a_fixed_temperature_may_be_what_a_learned_one_may_not(small_config: SmallConfig, tmp_path: Path) -> None:
    """And stays what it is: only a learned one is clamped."""
    config = small_config(methods__gap__temperature=2.0, optim__epochs=1)
    trainer = Trainer(config, "gap", 0, load_dataset(config.data), tmp_path, CPU)
    trainer.fit()
    assert float(trainer.log_logit_scale.exp()) == pytest.approx(0.5)


# Checkpoints


@pytest.fixture(scope="module")
def half_way(small_config: SmallConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer whose folder holds a checkpoint."""
    config = small_config(optim__epochs=1)
    folder = tmp_path_factory.mktemp("half-way")
    trainer = Trainer(config, "clip-lt", 0, load_dataset(config.data), folder, CPU)
    trainer.fit()
    return trainer


def resumed(trainer: Trainer) -> Trainer:
    """Build the trainer anew and bring back its checkpoint."""
    other = Trainer(trainer.config, trainer.method_name, trainer.seed, trainer.dataset, trainer.folder, CPU)
    other._resume()
    return other


def as_lists(value: Any) -> Any:
    """Replace tuples by lists, in which a value can be replaced, down to some depth."""
    if isinstance(value, dict):
        return {key: as_lists(entry) for key, entry in value.items()}
    return value


TENSORS = st.sampled_from(
    [
        torch.zeros(0),
        torch.tensor(torch.nan),
        torch.tensor(7.0),
        torch.zeros(3, 3, dtype=torch.complex64),
        torch.full((16, 16), torch.inf),
        torch.eye(16).to_sparse(),
        torch.zeros(16, 16, dtype=torch.float64),
    ]
)


@FUZZ
@given(data=st.data())
def test_any_value_in_a_checkpoint_is_refused_or_harmless(half_way: Trainer, data: st.DataObject) -> None:
    path = half_way.folder / CHECKPOINT
    state = as_lists(load_checkpoint(path))
    state = data.draw(spoiled(state, VALUES | TENSORS))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with changed(path, buffer.getvalue()):
        try:
            trainer = resumed(half_way)
        except UserError as error:
            one_line(error)
            return
    # What was taken back is a state that training can have left.
    assert 0 <= trainer.step <= trainer.total_steps
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    for parameter, moments in trainer.optimizer.state.items():
        assert moments["exp_avg"].shape == parameter.shape
    trainer._record = lambda split, values: None  # type: ignore[method-assign]
    trainer._train_step(torch.arange(trainer.config.optim.batch_size))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: torch.zeros(3), "damaged or not a checkpoint"),
        (lambda state: [1, 2], "damaged or not a checkpoint"),
        (lambda state: {k: v for k, v in state.items() if k != "random"}, "(.*random is missing)"),
        (lambda state: {k: v for k, v in state.items() if k != "step"}, "(.*step is missing)"),
        (lambda state: {k: v for k, v in state.items() if k != "log_size"}, "(.*log_size is missing)"),
        (lambda state: {**state, "seconds": "long"}, "seconds: input should be a valid number"),
        (lambda state: {**state, "step": 10**6}, "it is at step 1000000 of 8"),
        (lambda state: {**state, "method": "gap"}, "it is of method 'gap', seed 0, expected clip-lt, seed 0"),
        (lambda state: {**state, "seed": 5}, "it is of method 'clip-lt', seed 5"),
        (lambda state: {**state, "data": "other"}, "the data has changed since it was written"),
        (
            lambda state: {**state, "config": {**state["config"], "optim": {**state["config"]["optim"], "lr": 0.5}}},
            r"it has other settings \(optim.lr: 0.5 there, 0.005 now\)",
        ),
        (lambda state: {**state, "optimizer": {**state["optimizer"], "state": {}}}, "holds no moments of parameter 0"),
        (lambda state: {**state, "random": {}}, "random number generator is damaged, KeyError"),
        (
            lambda state: {
                **state,
                "optimizer": {
                    **state["optimizer"],
                    "param_groups": [
                        {**group, "weight_decay": torch.eye(16).to_sparse()}
                        for group in state["optimizer"]["param_groups"]
                    ],
                },
            },
            "is damaged",
        ),
        (
            lambda state: {
                **state,
                "model": {k: v * torch.nan if v.is_floating_point() else v for k, v in state["model"].items()},
            },
            "must be finite",
        ),
        (lambda state: {**state, "log_logit_scale": torch.zeros(2)}, "log_logit_scale must be torch.float32"),
        (lambda state: {**state, "log_digest": "0"}, None),
    ],
)
def test_a_checkpoint_that_is_not_of_this_run_is_refused(half_way: Trainer, spoil: Any, words: str | None) -> None:
    path = half_way.folder / CHECKPOINT
    buffer = io.BytesIO()
    torch.save(spoil(load_checkpoint(path)), buffer)
    with changed(path, buffer.getvalue()):
        if words is None:
            with pytest.raises(UserError, match=r"metrics\.jsonl is not the log of its checkpoint"):
                resumed_fit(half_way)
        else:
            with pytest.raises(UserError, match=words) as caught:
                resumed(half_way)
            one_line(caught.value)
            assert str(half_way.folder) in str(caught.value)


def resumed_fit(trainer: Trainer) -> None:
    Trainer(trainer.config, trainer.method_name, trainer.seed, trainer.dataset, trainer.folder, CPU).fit()


def test_moments_of_another_shape_are_refused(half_way: Trainer) -> None:
    path = half_way.folder / CHECKPOINT
    state = load_checkpoint(path)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with (
        changed(path, buffer.getvalue()),
        pytest.raises(UserError, match=r"exp_avg of parameter 0 must be torch\.float32"),
    ):
        resumed(half_way)


# Features and embeddings

ARRAYS = st.one_of(
    st.tuples(
        st.sampled_from(["f4", "f8", "f2", "i8", "u8", "i1", "u1", "?", "U3", "S3", "c8", ">f4", ">i8", "M8[s]"]),
        st.lists(st.sampled_from([0, 1, 2, 5, 40]), max_size=3),
        st.sampled_from([0, 1, -1, 2**31, "rising"]),
    ),
    st.sampled_from(
        [
            ("nan", [40, 3], 0),
            ("inf", [40, 3], 0),
            ("i8", [40], 2**63 - 1),
            ("i8", [40], 10**10),
            ("u8", [40], 2**64 - 1),
        ]
    ),
)


def build(kind: str, shape: list[int], fill: Any) -> np.ndarray:
    if kind in ("nan", "inf"):
        values = np.ones(shape)
        values.flat[-1] = float(kind)
        return values
    with np.errstate(all="ignore"):
        rising = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        if kind in ("U3", "S3", "M8[s]"):
            return rising.astype("i8").astype(kind)
        return (rising if fill == "rising" else np.array([fill]).repeat(rising.size).reshape(shape)).astype(kind)


@FUZZ
@given(
    name=st.sampled_from(["image", "text", "labels", "ids", "groups", "ids/image", "ids/text", "$\\frac", "a\nb"]),
    array=ARRAYS,
)
def test_any_array_in_a_features_file_is_read_or_named(tmp_path: Path, name: str, array: Any) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "image": generator.normal(size=(40, 3)),
        "text": generator.normal(size=(40, 3)),
        "labels": np.arange(40) % 3,
        "groups": np.arange(40) // 2,
    }
    np.savez(tmp_path / "train.npz", **{**arrays, name: build(*array)})
    for read in (
        lambda: load_dataset(FeaturesData(train_file="train.npz"), tmp_path),
        lambda: read_embeddings(tmp_path / "train.npz"),
        lambda: evaluate_file(tmp_path / "train.npz", None, None, CPU),
    ):
        refused_in_one_line(read)


def refused_in_one_line(read: Callable[[], object]) -> None:
    """Read; what cannot be read must be named in one line."""
    try:
        read()
    except UserError as error:
        one_line(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": np.where(np.eye(6) > 0, np.nan, 1.0)}, "`image` must be finite, found nan in row 0, column 0"),
        ({"text": np.full((6, 6), -np.inf)}, "`text` must be finite, found -inf in row 0"),
        ({"text": np.full((6, 6), 1e300)}, "`text` must be finite, found 1e+300 in row 0"),
        (
            {"labels": np.array([0, 1, -2, 0, 1, 2])},
            "`labels` must be numbers from 0, or -1 for none, found -2 in row 2",
        ),
        ({"labels": np.linspace(0, 1, 6)}, "`labels` must hold whole numbers, found torch.float64"),
        ({"ids": np.full(6, 2**64 - 1, dtype=np.uint64)}, "`ids` must be below 2^63"),
        ({"image": np.zeros((0, 6)), "text": np.zeros((0, 6))}, "must hold two or more arrays"),
    ],
)
def test_a_features_file_is_refused_with_array_and_row(
    tmp_path: Path, change: dict[str, np.ndarray], words: str
) -> None:
    np.savez(tmp_path / "train.npz", **{"image": np.eye(6), "text": np.eye(6), **change})
    with pytest.raises(UserError) as caught:
        load_dataset(FeaturesData(train_file="train.npz"), tmp_path)
    assert str(tmp_path / "train.npz") in str(caught.value)
    assert words in str(caught.value)
    one_line(caught.value)


@pytest.mark.parametrize("labels", [[10**10, 5] * 10, [2**63 - 1, 0] * 10])
def test_large_class_numbers_are_names(tmp_path: Path, labels: list[int]) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3))
    np.savez(tmp_path / "train.npz", image=rows, text=rows, labels=np.array(labels))
    dataset = load_dataset(FeaturesData(train_file="train.npz"), tmp_path)
    assert dataset.class_names == tuple(map(str, sorted(set(labels))))
    assert set(dataset.train.labels.tolist()) <= {0, 1}


def test_ids_by_modality_reach_the_metrics(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    image = generator.normal(size=(12, 8))
    text = np.repeat(image, 3, axis=0) + 0.1 * generator.normal(size=(36, 8))
    names = np.array([f"{number}.jpg" for number in range(12)])
    arrays = {"image": image, "text": text, "ids/image": names, "ids/text": np.repeat(names, 3)}
    np.savez(tmp_path / "e.npz", **arrays)
    found = evaluate_file(tmp_path / "e.npz", None, None, CPU)
    assert found["text_to_image/R@1"] == found["image_to_text/R@1"] == 1.0
    for change, words in (
        ({"ids": np.arange(12)}, "`ids` and `ids/...` do not go together"),
        ({"ids/text": np.arange(36)}, "numbers in one and names in another"),
        ({"ids/text": names}, r"`ids/text` must have shape \[36\], found \[12\]"),
        ({"ids/image": np.array([f"{n}.png" for n in range(12)])}, "ids that"),
    ):
        np.savez(tmp_path / "e.npz", **{**arrays, **change})
        with pytest.raises(UserError, match=words):
            evaluate_file(tmp_path / "e.npz", None, None, CPU)


def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    """Zeros that would take gigabytes, and a header that asks for them."""
    shape = (2**20, 256)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    for name, rows in (("zeros.npz", 2**16 + 2**12), ("header.npz", 0)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for array in ("image", "text"):
                with archive.open(f"{array}.npy", "w") as member:
                    member.write(header.getvalue())
                    for _ in range(rows // 2**12):
                        member.write(bytes(2**12 * 256 * 8))
    with pytest.raises(UserError, match=r"zeros\.npz.*unpack to .* are no data"):
        read_embeddings(tmp_path / "zeros.npz")
    with pytest.raises(UserError, match=r"header\.npz.*has the shape \[1048576, 256\], but not as many values"):
        read_embeddings(tmp_path / "header.npz")


# Data sets


@pytest.mark.parametrize("name", ["captions_train2017", "instances_train2017", "instances_val2017"])
@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_any_value_in_annotations_is_read_or_named(coco: Path, name: str, data: st.DataObject) -> None:
    path = coco / "annotations" / f"{name}.json"
    with changed(path, json_bytes(data.draw(spoiled(json.loads(path.read_bytes()))))):
        refused_in_one_line(lambda: load_dataset(COCOData(image_size=8), coco))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, train=3, test=3)
    return folder


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "captions_train2017",
            ("annotations", 0, "caption", None),
            "annotations.0.caption: input should be a",
        ),
        (
            "instances_train2017",
            ("annotations", 1, "category_id", 5),
            "category_id is 5, which is no category",
        ),
        (
            "captions_train2017",
            ("images", 0, "file_name", "../secret.jpg"),
            "must name a file in the folder",
        ),
        ("captions_train2017", ("images", 0, "file_name", "/etc/passwd"), "must name a file in the folder"),
        ("instances_val2017", ("categories", 0, "id", "one"), "categories.0.id: input should be a valid integer"),
    ],
)
def test_a_wrong_annotation_is_named(coco: Path, name: str, change: Any, words: str) -> None:
    path = coco / "annotations" / f"{name}.json"
    content = json.loads(path.read_bytes())
    section, number, key, value = change
    content[section][number][key] = value
    with changed(path, json_bytes(content)), pytest.raises(UserError, match=words) as caught:
        load_dataset(COCOData(image_size=8), coco)
    assert f"{name}.json" in str(caught.value)


@pytest.mark.parametrize("which", ["cifar10", "av-mnist"])
@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_any_array_in_a_data_set_is_read_or_named(arrays_folder: Path, which: str, data: st.DataObject) -> None:
    path = arrays_folder / ("train-0.npz" if which == "cifar10" else "fsdd.npz")
    with np.load(path) as file:
        arrays = dict(file)
    name = data.draw(st.sampled_from(sorted(arrays)))
    if data.draw(st.booleans()):
        arrays[name] = build(*data.draw(ARRAYS))
    else:
        values = arrays[name].copy()
        if values.size and values.dtype != bool:
            place = data.draw(st.integers(0, values.size - 1))
            limits = np.iinfo(values.dtype)
            values.flat[place] = data.draw(st.sampled_from([0, 77, limits.min, limits.max]))
        arrays[name] = values
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with changed(path, buffer.getvalue()):
        config = CIFAR10Data() if which == "cifar10" else AVMNISTData()
        refused_in_one_line(lambda: load_dataset(config, arrays_folder))


@pytest.fixture(scope="module")
def arrays_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrays")
    write_cifar_jpegs(folder / "cifar10")
    for path in (folder / "cifar10").iterdir():
        shutil.move(path, folder / path.name)
    (folder / "cifar10").rmdir()
    write_mnist(folder)
    write_spoken_digits(folder)
    return folder


def test_images_and_labels_of_mnist_are_what_they_should_be(tmp_path: Path) -> None:
    from training.data_files import write_idx

    write_spoken_digits(tmp_path)
    write_mnist(tmp_path, compressed=False)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.full(20, 77), compressed=False)
    with pytest.raises(UserError, match="t10k labels must be digits, found 77 in row 0"):
        load_dataset(AVMNISTData(), tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((20, 27, 27)), compressed=False)
    with pytest.raises(UserError, match="t10k images must be of 28x28 pixels, found 27x27"):
        load_dataset(AVMNISTData(), tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((1, 28, 28)), compressed=False)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(1), compressed=False)
    with pytest.raises(UserError, match="the test split of av-mnist must hold at least 2 samples, got 1"):
        load_dataset(AVMNISTData(), tmp_path)
