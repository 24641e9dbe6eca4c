"""AV-MNIST: a handwritten digit with most of its energy removed, a spoken digit in noise, and the digit's name.

Images are MNIST's, recordings those of the Free Spoken Digit Dataset; both are paired by class. Images lose what lies
outside their first principal components and recordings are covered with noise, as in the literature, so that neither
modality alone tells everything.

Source: Vielzeuf et al., "CentralNet: a Multilayer Approach for Multimodal Fusion", arXiv 1808.07275 (the construction,
there with TIDIGITS and ESC-50); LeCun et al., MNIST; Z. Jackson et al., Free Spoken Digit Dataset (CC BY-SA 4.0).
"""

from __future__ import annotations

import gzip
import math
import re
import wave
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gapkernels.errors import UserError
from gapkernels.reading import check_inflation
from gapkernels.training.data.dataset import Dataset, ImageSpec, Samples, Split, TextSpec, fingerprint_of
from gapkernels.training.data.digits import DIGIT_NAMES
from gapkernels.training.data.files import class_numbers, cut, find_first, read_file, require_folder
from gapkernels.training.data.principal_components import principal_components, reduce_to
from gapkernels.training.data.tokenizer import Tokenizer
from gapkernels.training.data.transforms import Lookup
from gapkernels.training.npz import open_npz
from gapkernels.training.settings import Integer, Number

_MNIST_FOLDERS = ("mnist/", "MNIST/raw/", "")
_IDX_UINT8 = 0x08
_SIDE = 28

_SAMPLE_RATE = 8000
_SECONDS = 1.0  # longer recordings lose their end: 99 % are shorter
_WINDOW, _HOP = 256, 200  # samples: 32 ms, 25 ms
_BANDS = 32
# Versions of each recording, with noise of their own.
_NOISE_DRAWS = 4
_TEST_INDICES = range(5)  # the recordings that the data set's own documentation puts into the test split


class _Recordings(NamedTuple):
    """float32 [R, samples] in [-1, 1], int64 [R], bool [R]."""

    waves: Tensor
    labels: Tensor
    is_test: Tensor


class AVMNISTData(Samples):
    """Handwritten digits, spoken digits and digit names."""

    dataset: Literal["av-mnist"] = Field(default="av-mnist", description="name of the data set")
    image_energy: Number = Field(
        default=0.25, gt=0, le=1, description="share of the images' variance that their principal components keep"
    )
    audio_snr_db: Number = Field(
        default=5.0, ge=-200, le=200, description="loudness of recordings over that of the noise, in decibels"
    )
    pairing_seed: Integer = Field(
        default=0, ge=0, lt=2**32, description="seed of the noise and of which recording meets which image"
    )


def load(config: AVMNISTData, data_dir: Path | None) -> Dataset:
    """Load MNIST and the spoken digits and pair them by class.

    Args:
        config: energy kept of the images, loudness of the noise, seed of the pairing.
        data_dir: holds MNIST's four idx files, with or without .gz, in `mnist/`, `MNIST/raw/` or directly, and the
            recordings as `fsdd/fsdd.npz` (arrays `audio` int16, `offsets`, `labels`, `is_test`, `sample_rate`) or as
            the original's `recordings/<digit>_<speaker>_<index>.wav`.

    Returns:
        Modalities `image` (float32 [N, 1, 28, 28]), `audio` (a log-spectrogram, float32 [N, 1, 32, 40]) and `text`
        (the digit's name as characters). All samples of one digit share its text, hence its id; those of one recording
        are a group. Training images meet training recordings only, test images test recordings.

    Raises:
        UserError: if files are missing or damaged.
    """
    folder = require_folder(data_dir, "av-mnist")
    recordings = _read_recordings(folder)
    train_images, test_images = _read_mnist(folder, "train"), _read_mnist(folder, "t10k")
    basis = principal_components(train_images[0], config.image_energy)
    tokenizer = Tokenizer.from_captions(DIGIT_NAMES, level="character")
    texts = tokenizer.encode(DIGIT_NAMES)

    reduced = reduce_to(train_images[0], basis)
    std, mean = torch.std_mean(reduced)
    generator = torch.Generator().manual_seed(config.pairing_seed)
    spectrograms = {
        is_test: _noisy_spectrograms(recordings.waves[recordings.is_test == is_test], config.audio_snr_db, generator)
        for is_test in (False, True)
    }
    audio_std, audio_mean = torch.std_mean(spectrograms[False])

    def split(images: Tensor, labels: Tensor, is_test: bool) -> Split:
        digits = recordings.labels[recordings.is_test == is_test]
        chosen = _pair(labels, digits, generator)
        table = ((spectrograms[is_test] - audio_mean) / audio_std).unsqueeze(1)
        return Split(
            modalities={"image": (images - mean) / std, "audio": chosen, "text": texts[labels]},
            labels=labels,
            ids=labels,
            transforms={"audio": Lookup(table)},
            groups=chosen % len(digits),
        )

    height, width = train_images[0].shape[-2:]
    return Dataset(
        train=split(reduced, train_images[1], is_test=False),
        test=split(reduce_to(test_images[0], basis), test_images[1], is_test=True),
        specs={
            "image": ImageSpec(channels=1, height=height, width=width),
            "audio": ImageSpec(channels=1, height=_BANDS, width=spectrograms[False].shape[-1]),
            "text": TextSpec(vocabulary_size=tokenizer.size, length=tokenizer.length),
        },
        class_names=DIGIT_NAMES,
        fingerprint=fingerprint_of(*train_images, *test_images, *recordings),
    )


def _read_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images, float32 [N, 1, H, W] in [0, 1], and labels, int64 [N]."""

    def read(kind: str, axes: int) -> Tensor:
        names = [f"{part}-{kind}-idx{axes}-ubyte", f"{part}-{kind}.idx{axes}-ubyte"]
        places = [f"{place}{name}{suffix}" for place in _MNIST_FOLDERS for name in names for suffix in ("", ".gz")]
        path = find_first(folder, places, f"MNIST's {part} {kind}")
        return read_file(path, lambda path: _read_idx(path, axes), f"an idx file of {axes} axes of bytes")

    images, labels = read("images", 3), read("labels", 1)
    if list(images.shape[1:]) != [_SIDE, _SIDE]:
        size = "x".join(map(str, images.shape[1:]))
        raise UserError(f"MNIST in {folder}: {part} images must be of {_SIDE}x{_SIDE} pixels, found {size}")
    wrong = (labels >= len(DIGIT_NAMES)).nonzero().flatten().tolist()
    if wrong:
        found = int(labels[wrong[0]])
        raise UserError(f"MNIST in {folder}: {part} labels must be digits, found {found} in row {wrong[0]}")
    if len(images) != len(labels):
        raise UserError(f"MNIST in {folder}: {len(images)} {part} images and {len(labels)} labels")
    return images.unsqueeze(1).float() / 255, labels.long()


def _read_idx(path: Path, axes: int) -> Tensor:
    """Read an idx file: two zero bytes, the type, the number of axes, each axis' length (big endian), the data."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        start = file.read(4)
        if start != bytes([0, 0, _IDX_UINT8, axes]):
            raise ValueError(f"it begins with {start.hex()}")
        lengths = file.read(4 * axes)
        if len(lengths) < 4 * axes:
            raise ValueError("it ends within its header")
        shape = np.frombuffer(lengths, dtype=">u4").tolist()
        check_inflation(math.prod(shape), path.stat().st_size)
        content = file.read(math.prod(shape) + 1)
    if len(content) != math.prod(shape):
        more = "more" if len(content) > math.prod(shape) else len(content)
        raise ValueError(f"{math.prod(shape)} bytes announced, {more} found")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).reshape(shape).copy())


def _read_recordings(folder: Path) -> _Recordings:
    path = find_first(
        folder,
        ["fsdd/fsdd.npz", "fsdd.npz", "fsdd/recordings", "free-spoken-digit-dataset/recordings", "recordings"],
        "the Free Spoken Digit Dataset",
    )
    read = _read_wav_folder if path.is_dir() else _read_npz
    recordings = read_file(path, read, "recordings of spoken digits")
    for is_test in (False, True):
        missing = set(range(len(DIGIT_NAMES))) - set(recordings.labels[recordings.is_test == is_test].tolist())
        if missing:
            part = "test" if is_test else "training"
            raise UserError(f"{path} must hold {part} recordings of every digit; it has none of {sorted(missing)}")
    return recordings


def _read_npz(path: Path) -> _Recordings:
    with open_npz(path) as file:
        audio, offsets, is_test, rate = (file[name] for name in ("audio", "offsets", "is_test", "sample_rate"))
        labels = class_numbers(file["labels"], len(DIGIT_NAMES))
    if audio.dtype != np.int16:
        raise ValueError(f"`audio` must hold 16-bit samples, found {audio.dtype}")
    if is_test.dtype != bool or is_test.shape != (len(labels),):
        raise ValueError(f"`is_test` must hold {len(labels)} truth values, found {is_test.dtype} {list(is_test.shape)}")
    if rate.shape != () or rate.dtype.kind not in "iu":
        raise ValueError(f"`sample_rate` must be one whole number, found {rate.dtype} {list(rate.shape)}")
    clips = cut(audio, offsets, len(labels), "samples")
    waves = torch.stack([_to_wave(clip, int(rate)) for clip in clips])
    return _Recordings(waves, labels, torch.from_numpy(is_test))


def _read_wav_folder(path: Path) -> _Recordings:
    waves, labels, is_test = [], [], []
    for file in sorted(path.glob("*.wav")):
        match = re.fullmatch(r"(\d)_\w+_(\d+)", file.stem)
        if match is None:
            raise ValueError(f"{file.name} is not named <digit>_<speaker>_<index>.wav")
        with wave.open(str(file), "rb") as recording:
            if (recording.getnchannels(), recording.getsampwidth()) != (1, 2):
                raise ValueError(f"{file.name} must be mono with 16 bits per sample")
            samples = np.frombuffer(recording.readframes(recording.getnframes()), dtype="<i2")
            waves.append(_to_wave(samples, recording.getframerate()))
        labels.append(int(match[1]))
        is_test.append(int(match[2]) in _TEST_INDICES)
    if not waves:
        raise ValueError("it holds no .wav file")
    return _Recordings(torch.stack(waves), torch.tensor(labels), torch.tensor(is_test))


def _to_wave(samples: np.ndarray, rate: int) -> Tensor:
    """Return one second of float samples: the middle of a short recording is silence around it."""
    if rate != _SAMPLE_RATE:
        raise ValueError(f"the sample rate must be {_SAMPLE_RATE} Hz, got {rate}")
    length = round(_SECONDS * _SAMPLE_RATE)
    clip = torch.from_numpy(samples[:length].astype(np.float32)) / 32768
    before = (length - len(clip)) // 2
    return F.pad(clip, (before, length - len(clip) - before))


def _noisy_spectrograms(waves: Tensor, snr_db: float, generator: torch.Generator) -> Tensor:
    """Return log-spectrograms of every recording in several draws of noise.

    Args:
        waves: float32 [R, samples].
        snr_db: loudness of the recording over that of the noise, in decibels.
        generator: of the noise.

    Returns:
        float32 [draws·R, bands, frames], draw by draw.
    """
    loudness = waves.square().mean(dim=1, keepdim=True).sqrt()
    drawn = []
    for _ in range(_NOISE_DRAWS):
        noise = torch.randn(waves.shape, generator=generator) * loudness * 10 ** (-snr_db / 20)
        drawn.append(_log_spectrogram(waves + noise))
    return torch.cat(drawn)


def _log_spectrogram(waves: Tensor) -> Tensor:
    """Return the logarithm of the energy in mel bands over time, float32 [R, bands, frames]."""
    spectrum = torch.stft(waves, _WINDOW, _HOP, window=torch.hann_window(_WINDOW), return_complex=True)
    energy = torch.einsum("bf,rft->rbt", _mel_bands(), spectrum.abs().square())
    # The last frame is centred on the end of the signal and mostly padding.
    return (energy[..., :-1] + 1e-6).log()


def _mel_bands() -> Tensor:
    """Return triangular filters [bands, frequencies], evenly spaced on the mel scale (O'Shaughnessy's formula)."""
    highest = 2595 * math.log10(1 + _SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, highest, _BANDS + 2) / 2595) - 1)
    frequencies = torch.linspace(0, _SAMPLE_RATE / 2, _WINDOW // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def _pair(labels: Tensor, recorded_digits: Tensor, generator: torch.Generator) -> Tensor:
    """Choose for each image a noisy recording of its digit, at random; return the row in the table, int64 [N]."""
    chosen = torch.empty_like(labels)
    for digit in range(len(DIGIT_NAMES)):
        images = (labels == digit).nonzero().flatten()
        recordings = (recorded_digits == digit).nonzero().flatten()
        drawn = torch.randint(len(recordings), (len(images),), generator=generator)
        draw = torch.randint(_NOISE_DRAWS, (len(images),), generator=generator)
        chosen[images] = recordings[drawn] + draw * len(recorded_digits)
    return chosen
