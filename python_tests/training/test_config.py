from pathlib import Path

import pytest

from gapkernels.errors import UserError
from gapkernels.training.config import (
    Config,
    describe_config,
    dump_config,
    load_config,
    parse_override,
    preset_names,
    read_config,
)


def test_digits_preset_compares_the_three_methods_of_the_paper() -> None:
    config = load_config("digits")
    assert list(config.methods) == ["clip-lt", "clip-ft", "gap"]
    assert len(config.seeds) >= 2
    learned, fixed, gap = config.methods.values()
    assert learned.learn_temperature
    assert not fixed.learn_temperature
    for clip in (learned, fixed):
        assert (clip.atp.initial, clip.atp.final, clip.cu.initial, clip.cu.final) == (0, 0, 0, 0)
    assert (gap.cu.initial, gap.cu.final, gap.cu.start, gap.cu.stop) == (1.0, 0.0, 0.2, 0.7)
    assert (gap.atp.initial, gap.atp.final, gap.atp.start, gap.atp.stop) == (1.0, 2.0, 0.5, 1.0)


def test_command_line_outranks_file_outranks_preset(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("optim: {lr: 0.5, epochs: 7}\nmethods: {gap: {temperature: 0.3}}\n")
    second.write_text("optim: {epochs: 8}\n")
    config = load_config("digits", [first, second], {"optim.lr": "1e-2"})
    assert config.optim.lr == 0.01
    assert config.optim.epochs == 8
    assert config.methods["gap"].temperature == 0.3
    # What no one mentions stays: the other settings of the method, the other methods.
    assert config.methods["gap"].cu == load_config("digits").methods["gap"].cu
    assert list(config.methods) == ["clip-lt", "clip-ft", "gap"]


def test_a_number_is_a_constant_weight() -> None:
    ramp = load_config("digits", overrides={"methods.gap.cu": 0.5}).methods["gap"].cu
    assert (ramp.initial, ramp.final) == (0.5, 0.5)


def test_a_method_can_be_added() -> None:
    overrides = {"methods.constant.cu": 1, "methods.constant.atp": 1}
    assert load_config("digits", overrides=overrides).methods["constant"].cu.final == 1


@pytest.mark.parametrize("preset", preset_names())
def test_a_configuration_survives_a_file(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert read_config(path) == config
    # The description is the same YAML with comments.
    path.write_text(describe_config(config))
    assert read_config(path) == config
    assert "  # peak learning rate" in describe_config(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"optim.lrr": 1}, ["optim.lrr", "did you mean optim.lr?"]),
        ({"optimm.lr": 1}, ["optimm", "did you mean optim?"]),
        ({"methods.gap.cu.strat": 0.1}, ["methods.gap.cu.strat", "did you mean methods.gap.cu.start?"]),
        ({"model.encoders.image.widht": 8}, ["model.encoders.image.widht", "model.encoders.image.width"]),
        ({"optim.lr": "fast"}, ["optim.lr", "number", "'fast'"]),
        ({"optim.lr": -1}, ["optim.lr", "greater than 0", "-1"]),
        ({"optim.epochs": 2.5}, ["optim.epochs", "integer", "2.5"]),
        ({"optim.epochs": True}, ["optim.epochs", "True"]),
        ({"optim": 3}, ["optim", "3"]),
        ({"optim.optimizer": "sgd"}, ["optim.optimizer", "'adam'", "'sgd'"]),
        ({"model.encoders.image.kind": "perceiver"}, ["model.encoders.image", "'perceiver'", "'image-cnn'"]),
        ({"model.encoders.text.heads": 5}, ["model.encoders.text", "multiple"]),
        ({"model.anchor": "audio"}, ["`anchor`", "'audio'", "image, text"]),
        ({"methods.gap.cu.start": 0.9}, ["methods.gap.cu", "0.9", "0.7"]),
        ({"methods.new.cu.final": 1}, ["methods.new.cu.initial is missing"]),
        ({"seeds": ["x"]}, ["seeds.0", "integer", "'x'"]),
        ({"data.dataset": "imagenet"}, ["data.dataset", "'digits'", "'imagenet'"]),
    ],
)
def test_a_mistake_is_named_in_one_line(overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("digits", overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'digit'; did you mean digits\?; presets: .*digits"):
        load_config("digit")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("optim: [1\n", "not valid YAML"),
        ("- 1\n", "must hold a mapping"),
        ("optim: {lrr: 1}\n", "did you mean optim.lr?"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_config("digits", [path])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config("digits", [tmp_path / "nowhere.yaml"])


def test_only_the_seeds_may_differ_within_one_experiment() -> None:
    config: Config = load_config("digits")
    assert config.same_experiment(load_config("digits", overrides={"seeds": [7]}))
    assert not config.same_experiment(load_config("digits", overrides={"optim.lr": 0.1}))


@pytest.mark.parametrize(
    ("text", "value"), [("null", None), ("true", True), ("3", 3), ("0.5", 0.5), ("[1, 2]", [1, 2]), ("a: [", "a: [")]
)
def test_values_on_the_command_line_are_yaml(text: str, value: object) -> None:
    assert parse_override(text) == value


def test_a_preset_can_extend_another_one() -> None:
    full, small = load_config("cifar10"), load_config("cifar10-small")
    assert {name: small.methods[name] for name in full.methods} == full.methods
    assert set(small.methods) - set(full.methods) == {"gap-light"}
    assert small.optim.batch_size == full.optim.batch_size
    assert small.data.train_samples == 20000
    # The image encoder is of another kind: nothing of the other one's settings stays.
    assert full.model.encoders["image"].kind == "resnet50"
    assert small.model.encoders["image"].kind == "image-cnn"


def test_another_kind_of_encoder_replaces_all_settings_of_the_first() -> None:
    overrides = {"model.encoders.image.depth": 3, "model.encoders.image.heads": 4, "model.encoders.image.kind": "vit"}
    encoder = load_config("digits", overrides=overrides | {"model.encoders.image.width": 64}).model.encoders["image"]
    assert (encoder.kind, encoder.depth, encoder.heads, encoder.width) == ("vit", 3, 4, 64)
    data = load_config("digits", overrides={"data.image_energy": 0.5, "data.dataset": "av-mnist"}).data
    assert (data.dataset, data.image_energy, data.audio_snr_db) == ("av-mnist", 0.5, 5.0)


@pytest.mark.parametrize("preset", ["cifar10", "av-mnist", "mscoco", "features"])
def test_full_presets_have_the_settings_of_the_paper(preset: str) -> None:
    config, digits = load_config(preset), load_config("digits")
    assert (config.optim.optimizer, config.optim.epochs, config.optim.batch_size) == ("adam", 100, 256)
    assert config.optim.warmup == 0.2
    assert len(config.seeds) == 3
    if preset != "features":
        assert config.optim.lr == 1e-4
    for name, method in config.methods.items():
        assert (method.temperature, method.atp, method.cu) == (
            digits.methods[name].temperature,
            digits.methods[name].atp,
            digits.methods[name].cu,
        )
