"""Typed configuration: preset, then the user's YAML files, then the command line; validated once, after merging."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from gapkernels.errors import UserError, printable, shown
from gapkernels.reading import message
from gapkernels.training.data import Data, DigitsData
from gapkernels.training.embeddings import NOT_A_MODALITY
from gapkernels.training.settings import Integer, Number, Section

# Bounds beyond which a value is a slip of the keyboard: it would crash or hang only after a while.
_LARGEST_SIZE = 2**24  # samples and steps
_WIDEST, _DEEPEST = 8192, 128  # layers of an encoder
_WIDEST_CNN, _DEEPEST_CNN = 512, 8  # whose width doubles with each stage
_MOST_HEADS = 512
_LARGEST_WEIGHT = 1e4
_MOST_SEEDS = 1000
_LONGEST_NAME = 100
# Names in a run folder that no method may take.
_RESERVED = ("plots",)


# Keys whose value decides which other keys a mapping may have.
_KINDS = ("kind", "dataset")
# Mappings whose entries can be taken away again.
_REMOVABLE = ("encoders", "methods")


class Ramp(Section):
    """A weight that stays at `initial`, then moves linearly to `final`; a plain number means a constant weight."""

    initial: Number = Field(ge=0, le=_LARGEST_WEIGHT, description="value until `start`")
    final: Number = Field(ge=0, le=_LARGEST_WEIGHT, description="value from `stop` on")
    start: Number = Field(default=0.0, ge=0, le=1, description="where the ramp begins, as a fraction of training")
    stop: Number = Field(default=1.0, ge=0, le=1, description="where the ramp ends, as a fraction of training")

    @model_validator(mode="before")
    @classmethod
    def _constant(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"initial": value, "final": value}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Ramp:
        if self.start > self.stop:
            raise ValueError(f"`start` ({self.start}) must not be after `stop` ({self.stop})")
        return self


class Method(Section):
    """One loss to train with: temperature and the weights of the two gap-closing terms."""

    temperature: Number = Field(
        default=0.1, ge=1e-3, le=1e3, description="temperature of the soft-max (initial value if learned)"
    )
    learn_temperature: bool = Field(
        default=False, description="learn the temperature, clamped at a logit scale of 100 like CLIP"
    )
    temperature_lr: Number = Field(
        default=1.0, gt=0, le=1e3, description="learning rate of a learned temperature, as a multiple of optim.lr"
    )
    atp: Ramp = Field(default=Ramp(initial=0, final=0), description="weight of align true pairs")
    cu: Ramp = Field(default=Ramp(initial=0, final=0), description="weight of centroid uniformity")
    uniformity_t: Number = Field(
        default=2.0, gt=0, le=1e3, description="t of the Gaussian potential in centroid uniformity"
    )
    opening: Number = Field(
        default=0.0, ge=0, lt=1, description="fraction of training, at its start, on centroid uniformity alone"
    )
    duplicates: Literal["negative", "mask", "positive"] = Field(
        default="negative",
        description="what samples that say the same, by one caption or class name, are to each other: negatives like "
        "any other, left out, or positives",
    )
    uniformity_of_equal_ids: bool = Field(
        default=True, description="whether centroid uniformity pushes apart samples that say the same"
    )

    @model_validator(mode="after")
    def _learnable(self) -> Method:
        if self.learn_temperature and not 0.01 <= self.temperature <= 1:
            raise ValueError(f"a learned `temperature` stays in [0.01, 1], got {self.temperature} to start from")
        return self

    @model_validator(mode="after")
    def _knows_duplicates(self) -> Method:
        if self.duplicates == "negative" and not self.uniformity_of_equal_ids:
            raise ValueError("`uniformity_of_equal_ids: false` needs `duplicates` to be mask or positive, got negative")
        return self


class ImageCNNConfig(Section):
    """Convolutional image encoder: each stage after the first halves the resolution and doubles the channels."""

    kind: Literal["image-cnn"]
    width: Integer = Field(default=32, gt=0, le=_WIDEST_CNN, description="channels of the first stage")
    depth: Integer = Field(default=2, gt=0, le=_DEEPEST_CNN, description="number of stages")
    stem_stride: Integer = Field(
        default=1, gt=0, le=64, description="stride of the first convolution; 2 is 4 times faster"
    )


class FastCNNConfig(Section):
    """Convolutional image encoder of the CIFAR-10 speed runs: whitening, then groups that halve the resolution."""

    kind: Literal["fast-cnn"]
    widths: tuple[Annotated[Integer, Field(gt=0, le=4 * _WIDEST_CNN)], ...] = Field(
        default=(64, 256, 256), min_length=1, max_length=_DEEPEST_CNN, description="channels of each group"
    )


class TextTransformerConfig(Section):
    """Transformer text encoder over the tokens of a caption."""

    kind: Literal["text-transformer"]
    width: Integer = Field(default=64, gt=0, le=_WIDEST, description="width of the residual stream")
    depth: Integer = Field(default=2, gt=0, le=_DEEPEST, description="number of layers")
    heads: Integer = Field(default=4, gt=0, le=_MOST_HEADS, description="attention heads")
    dropout: Number = Field(default=0.1, ge=0, lt=1, description="dropout in attention and feed-forward blocks")

    @model_validator(mode="after")
    def _divisible(self) -> TextTransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"`width` ({self.width}) must be a multiple of `heads` ({self.heads})")
        return self


class ResNetConfig(Section):
    """Residual network for images, He et al.'s with the stem of their CIFAR networks or of their ImageNet ones."""

    kind: Literal["resnet18", "resnet50"]
    stem: Literal["small", "large"] = Field(
        default="small", description="small: a 3x3 convolution; large: a 7x7 one and pooling, 4 times less resolution"
    )
    norm: Literal["batch", "group"] = Field(
        default="batch", description="group norm treats every sample alone, so micro-batches change no number"
    )
    width: Integer = Field(default=64, gt=0, le=_WIDEST_CNN, multiple_of=8, description="channels of the first stage")


class ViTConfig(Section):
    """Vision transformer over square patches."""

    kind: Literal["vit"]
    patch_size: Integer = Field(default=4, gt=0, le=2048, description="side of a patch in pixels")
    width: Integer = Field(default=192, gt=0, le=_WIDEST, description="width of the residual stream")
    depth: Integer = Field(default=6, gt=0, le=_DEEPEST, description="number of layers")
    heads: Integer = Field(default=3, gt=0, le=_MOST_HEADS, description="attention heads")
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="dropout in attention and feed-forward blocks")

    @model_validator(mode="after")
    def _divisible(self) -> ViTConfig:
        if self.width % self.heads:
            raise ValueError(f"`width` ({self.width}) must be a multiple of `heads` ({self.heads})")
        return self


class SpectrogramCNNConfig(Section):
    """Convolutional encoder of spectrograms: keeps the frequency axis to the end and averages over time."""

    kind: Literal["spectrogram-cnn"]
    width: Integer = Field(
        default=32, gt=0, le=_WIDEST_CNN, description="channels of the first stage, doubled with each"
    )
    depth: Integer = Field(default=3, gt=0, le=_DEEPEST_CNN, description="stages, each halving both axes")


class MLPConfig(Section):
    """Multilayer perceptron for features."""

    kind: Literal["mlp"]
    width: Integer = Field(default=512, gt=0, le=_WIDEST, description="width of the hidden layers")
    depth: Integer = Field(default=1, gt=0, le=_DEEPEST, description="number of hidden layers")
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="dropout after each hidden layer")


class OpenCLIPConfig(Section):
    """A tower of an open_clip model, built by name."""

    kind: Literal["open-clip-image", "open-clip-text"]
    model: str = Field(default="RN50", description="name of an open_clip model")
    weights: str | None = Field(default=None, description="file with weights of the model (null: random weights)")


EncoderConfig = Annotated[
    ImageCNNConfig
    | FastCNNConfig
    | TextTransformerConfig
    | ResNetConfig
    | ViTConfig
    | SpectrogramCNNConfig
    | MLPConfig
    | OpenCLIPConfig,
    Field(discriminator="kind"),
]


class Model(Section):
    """One encoder per modality and the joint space they project into."""

    embed_dim: Integer = Field(default=64, gt=0, le=_WIDEST, description="dimension D of the joint space")
    anchor: str = Field(default="text", description="modality that every other one is paired with")
    encoders: dict[str, EncoderConfig] = Field(description="encoder of each modality")
    default_encoder: EncoderConfig | None = Field(
        default=None,
        description="encoder of every modality of the data that `encoders` does not name; where none is called `text`, "
        "the first in the alphabet is the anchor unless another is named (null: name them all)",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_encoders(cls, value: Any) -> Any:
        """Take from the default encoder what an encoder without a kind does not say."""
        default, encoders = (
            value.get(key) if isinstance(value, dict) else None for key in ("default_encoder", "encoders")
        )
        if not (isinstance(default, dict) and isinstance(encoders, dict)):
            return value
        complete = {
            name: {**default, **entry} if isinstance(entry, dict) and "kind" not in entry else entry
            for name, entry in encoders.items()
        }
        return {**value, "encoders": complete}

    @model_validator(mode="after")
    def _anchor_has_encoder(self) -> Model:
        if self.default_encoder is None:
            if len(self.encoders) < 2:
                raise ValueError(f"`encoders` must name at least 2 modalities, got {len(self.encoders)}")
            if self.anchor not in self.encoders:
                raise ValueError(f"`anchor` is {self.anchor!r} but the encoders are {', '.join(self.encoders)}")
        for modality in self.encoders:
            if modality in NOT_A_MODALITY or not modality:
                raise ValueError(f"no modality can be called {modality!r}")
        return self

    def for_modalities(self, modalities: Iterable[str]) -> Model:
        """Return the settings with an encoder for each modality of the data, and an anchor among them.

        Raises:
            UserError: if the anchor that was asked for is none of them.
        """
        default = self.default_encoder
        if default is None:
            return self
        names = [*self.encoders, *sorted(set(modalities) - set(self.encoders))]
        encoders = {name: self.encoders.get(name, default) for name in names}
        anchor = self.anchor
        if anchor not in names:
            if anchor != type(self).model_fields["anchor"].default:
                raise UserError(f"model.anchor is {shown(anchor)}, but the data has {printable(', '.join(names))}")
            anchor = min(names)
        return self.model_copy(update={"encoders": encoders, "anchor": anchor, "default_encoder": None})


class Optim(Section):
    """Optimiser and learning-rate schedule."""

    optimizer: Literal["adam", "adamw"] = Field(default="adamw", description="adam or adamw")
    lr: Number = Field(default=1e-3, gt=0, le=1e3, description="peak learning rate")
    weight_decay: Number = Field(
        default=0.0, ge=0, le=1e3, description="weight decay of matrices (never of biases and norms)"
    )
    warmup: Number = Field(
        default=0.2, ge=0, lt=1, description="fraction of training with a linear warm-up; a cosine follows"
    )
    epochs: Integer = Field(default=100, gt=0, le=10**6, description="passes over the training data")
    batch_size: Integer = Field(
        default=256,
        gt=1,
        le=_LARGEST_SIZE,
        description="samples per step, of all processes together; the incomplete last batch is dropped",
    )
    micro_batch_size: Integer | None = Field(
        default=None,
        gt=0,
        le=_LARGEST_SIZE,
        description="samples encoded at a time, by gradient caching (null: all that a process has of a batch)",
    )
    grad_clip: Number | None = Field(
        default=None, gt=0, le=1e9, description="largest gradient norm (null: no clipping)"
    )
    precision: Literal["fp32", "bf16", "fp64", "auto"] = Field(
        default="fp32",
        description="bf16 runs the encoders under autocast; auto does so where the device multiplies in bf16; fp64 is "
        "for comparing runs beyond rounding",
    )


class Run(Section):
    """What happens around the training steps."""

    log_every: Integer = Field(default=5, gt=0, le=_LARGEST_SIZE, description="steps between records of the loss")
    eval_every: Integer = Field(
        default=5, gt=0, le=_LARGEST_SIZE, description="epochs between evaluations on the test split"
    )
    checkpoint_every: Integer = Field(default=100, gt=0, le=_LARGEST_SIZE, description="steps between checkpoints")
    keep_checkpoints: Integer = Field(
        default=1, gt=0, le=1000, description="how many checkpoints to keep, the older ones as checkpoint-<step>.pt"
    )
    threads: Integer | None = Field(
        default=None,
        gt=0,
        le=1024,
        description="CPU threads (null: as many as the libraries choose); results depend on it",
    )
    deterministic: bool = Field(
        default=True, description="deterministic algorithms, so that a resumed run equals an unbroken one"
    )


class Config(Section):
    """Everything that defines an experiment."""

    name: str = Field(
        default="custom",
        pattern=r"^[\w.-]+$",
        max_length=_LONGEST_NAME,
        description="title of the report and name of the run folder",
    )
    seeds: tuple[Annotated[Integer, Field(ge=0, lt=2**32)], ...] = Field(
        default=(0,), min_length=1, max_length=_MOST_SEEDS, description="one run per method and seed"
    )
    data: Data = DigitsData()
    model: Model
    optim: Optim = Optim()
    run: Run = Run()
    methods: dict[Annotated[str, Field(pattern=r"^[\w-]+$", max_length=_LONGEST_NAME)], Method] = Field(
        min_length=1, description="losses to compare"
    )

    @model_validator(mode="after")
    def _names_of_folders(self) -> Config:
        if not self.name.strip("."):
            raise ValueError(f"`name` is the name of a folder, it cannot be {self.name!r}")
        for method in self.methods:
            if method.lower() in _RESERVED:
                raise ValueError(f"`methods` cannot hold {method!r}: the run folder has a folder of that name")
        return self

    def for_modalities(self, modalities: Iterable[str]) -> Config:
        """Return the configuration with an encoder for each modality of the data."""
        return self.model_copy(update={"model": self.model.for_modalities(modalities)})

    def same_experiment(self, other: Config) -> bool:
        """Tell whether runs of the two configurations may share a folder: they may differ in the seeds only."""
        return self.model_copy(update={"seeds": ()}) == other.model_copy(update={"seeds": ()})

    def difference(self, other: Config) -> str:
        """Name the first settings, beside the seeds, that are not those of another configuration."""
        here, there = flatten(self.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
        missing: Any = "absent"
        changed = [
            f"{key}: {there.get(key, missing)} there, {here.get(key, missing)} now"
            for key in dict.fromkeys([*there, *here])
            if key != "seeds" and there.get(key, missing) != here.get(key, missing)
        ]
        return "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")


def preset_names() -> list[str]:
    """Return the names of the presets shipped with the package."""
    folder = resources.files("gapkernels.training") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(preset: str, files: Iterable[Path] = (), overrides: Mapping[str, Any] | None = None) -> Config:
    """Build the configuration of an experiment.

    Args:
        preset: name of a preset of the package.
        files: YAML files whose keys replace those of the preset, the later file first in rank.
        overrides: values by dotted key (`optim.lr`), the highest rank of all.

    Returns:
        The validated configuration.

    Raises:
        UserError: for an unknown preset, an unreadable file, an unknown key or a value that does not fit.
    """
    if preset not in preset_names():
        raise UserError(
            f"unknown preset {preset!r}{did_you_mean(preset, preset_names())}; presets: {', '.join(preset_names())}"
        )
    tree = _read_preset(preset)
    known_keys = _with_groups(flatten(Config.model_validate(tree).model_dump()))
    for file in files:
        tree = _merge(tree, _read_yaml(file))
    # The kind of an encoder or data set first: it decides which other settings there are.
    for key, value in sorted((overrides or {}).items(), key=lambda item: not item[0].endswith(_KINDS)):
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    return _validate(tree, known_keys)


def read_config(path: Path) -> Config:
    """Read a complete configuration, as `dump_config` wrote it."""
    try:
        return validate_config(_read_yaml(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def validate_config(tree: dict[str, Any]) -> Config:
    """Return the configuration that nested mappings hold.

    Raises:
        UserError: for an unknown key or a value that does not fit.
    """
    return _validate(tree, known_keys=[])


def dump_config(config: Config) -> str:
    """Write a configuration as YAML that `read_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_config(config: Config) -> str:
    """Write a configuration as YAML in which every setting carries its description as a comment."""
    return "\n".join(_describe(config, indent=""))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def parse_override(text: str) -> Any:
    """Read a value from the command line like one in a YAML file: `null`, `true`, `[1, 2]`, numbers, words."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: no date, or a number of too many digits
        return text


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean ...?` for the closest candidate, or nothing if none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _read_preset(name: str) -> dict[str, Any]:
    """Read a preset; its key `extends` names another one whose settings it changes."""
    text = (resources.files("gapkernels.training") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    tree: dict[str, Any] = yaml.safe_load(text)
    base = tree.pop("extends", None)
    return tree if base is None else _merge(_read_preset(base), tree)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path} ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {printable(' '.join(str(error).split()))}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of settings, found {type(tree).__name__}")
    return tree


def _merge(base: Any, update: Any, removable: bool = False) -> Any:
    """Return `base` with the keys of `update` set, mapping by mapping; another kind of thing replaces the whole.

    Args:
        base: settings.
        update: settings that replace them.
        removable: whether `null` takes an entry away, as it does an encoder or a method.
    """
    if not (isinstance(base, dict) and isinstance(update, dict)):
        return update
    if any(kind in base and kind in update and base[kind] != update[kind] for kind in _KINDS):
        return update
    merged = {**base, **{key: _merge(base.get(key), value, key in _REMOVABLE) for key, value in update.items()}}
    return {key: value for key, value in merged.items() if value is not None or not removable}


def _validate(tree: dict[str, Any], known_keys: list[str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False)
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise UserError(_explain(details[0], tree, known_keys) + more) from error
    except RecursionError as error:
        raise UserError("the settings are nested too deeply") from error


def _explain(detail: Any, tree: dict[str, Any], known_keys: list[str]) -> str:
    """Turn one validation error into `key: what is wrong`."""
    parts: list[str] = []
    here: Any = tree
    for part in detail["loc"]:
        # pydantic puts the tag of a union into the location; it is no key of the file.
        if isinstance(here, dict) and part not in here and detail["type"] != "missing":
            continue
        parts.append(printable(str(part)))
        here = here.get(part) if isinstance(here, dict) else None
    key = ".".join(parts)
    if detail["type"] == "union_tag_invalid":
        context = detail["ctx"]
        tag_key = f"{key}.{context['discriminator'].strip(chr(39))}"
        return f"{tag_key}: must be one of {context['expected_tags']}, got {shown(context['tag'])}"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}{did_you_mean(key, known_keys)}"
    if detail["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {message(detail)}" if key else message(detail)


def _with_groups(keys: Iterable[str]) -> list[str]:
    """Add to dotted keys the groups they are in."""
    return list(
        dict.fromkeys(".".join(key.split(".")[:depth]) for key in keys for depth in range(1, key.count(".") + 2))
    )


def _describe(section: Section, indent: str) -> Iterable[str]:
    for name, field in type(section).model_fields.items():
        yield from _describe_value(name, getattr(section, name), field.description, indent)


def _describe_value(name: str, value: Any, description: str | None, indent: str) -> Iterable[str]:
    comment = f"  # {description}" if description else ""
    if isinstance(value, Section):
        yield f"{indent}{name}:{comment}"
        yield from _describe(value, indent + "  ")
    elif isinstance(value, dict) and value:
        yield f"{indent}{name}:{comment}"
        for key, entry in value.items():
            yield from _describe_value(_scalar(key), entry, None, indent + "  ")
    else:
        yield f"{indent}{name}: {_scalar(list(value) if isinstance(value, tuple) else value)}{comment}"


def _scalar(value: Any) -> str:
    """A value on one line of YAML, quoted where a reader would take it for something else."""
    return yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize).removesuffix("...\n").strip()
