"""Tiny data sets in the formats of the real ones."""

import gzip
import json
import pickle
import wave
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_idx(path: Path, values: np.ndarray, compressed: bool) -> None:
    """Write bytes in the format of MNIST's files."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path = path.with_name(path.name + ".gz") if compressed else path
    path.write_bytes(gzip.compress(content) if compressed else content)


def write_mnist(folder: Path, train: int = 40, test: int = 20, compressed: bool = True) -> None:
    """Write images whose brightest row tells the digit, with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        images = generator.integers(0, 60, (count, 28, 28))
        images[np.arange(count), 2 * labels + 4] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte", images, compressed)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels, compressed)


def tone(digit: int, seconds: float = 0.4) -> np.ndarray:
    """Return a tone whose pitch tells the digit, int16 at 8 kHz."""
    time = np.arange(int(8000 * seconds)) / 8000
    return (12000 * np.sin(2 * np.pi * (300 + 300 * digit) * time)).astype(np.int16)


def write_spoken_digits(folder: Path) -> None:
    """Write two training recordings and one test recording of each digit, of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = np.repeat(np.arange(10), 3)
    clips = [tone(digit, 0.3 + 0.4 * (number % 3)) for number, digit in enumerate(digits)]
    np.savez(
        folder / "fsdd.npz",
        audio=np.concatenate(clips),
        offsets=np.cumsum([0, *map(len, clips)]),
        labels=digits.astype(np.uint8),
        is_test=np.arange(30) % 3 == 0,
        sample_rate=np.int32(8000),
    )


def write_wav_recordings(folder: Path) -> None:
    """Write the recordings of `write_spoken_digits` in the layout of the original repository."""
    folder.mkdir(parents=True)
    for number, digit in enumerate(np.repeat(np.arange(10), 3)):
        # Indices 0 to 4 are the test split.
        index = 0 if number % 3 == 0 else 4 + number % 3
        with wave.open(str(folder / f"{digit}_someone_{index}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(tone(digit, 0.3 + 0.4 * (number % 3)).tobytes())


def cifar_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return smooth images, which JPEG hardly changes: uint8 [N, 3, 32, 32] and labels [N]."""
    generator = np.random.default_rng(seed)
    low, high = generator.integers(0, 256, (2, count, 3, 1, 1))
    ramp = np.linspace(0, 1, 32).reshape(1, 1, 32, 1)
    images = np.broadcast_to(low + (high - low) * ramp, (count, 3, 32, 32))
    return images.round().astype(np.uint8), np.arange(count) % 10


def write_cifar_batches(folder: Path, per_batch: int = 12) -> None:
    """Write the layout of the original download for Python."""
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        images, labels = cifar_images(per_batch, seed=number)
        content = {b"data": images.reshape(per_batch, -1), b"labels": labels.tolist(), b"batch_label": name.encode()}
        with (folder / name).open("wb") as file:
            pickle.dump(content, file, protocol=2)


def write_cifar_jpegs(folder: Path) -> None:
    """Write the images of `write_cifar_batches` as JPEG streams, in files of 30 and of 12."""
    folder.mkdir(parents=True)
    images, labels = (
        np.concatenate(parts) for parts in zip(*(cifar_images(12, seed) for seed in range(5)), strict=True)
    )
    parts = {"train-0": (images[:30], labels[:30]), "train-1": (images[30:], labels[30:]), "test": cifar_images(12, 5)}
    for name, (pixels, numbers) in parts.items():
        streams = [jpeg(image) for image in pixels]
        np.savez(
            folder / f"{name}.npz",
            jpeg=np.frombuffer(b"".join(streams), dtype=np.uint8),
            offsets=np.cumsum([0, *map(len, streams)]),
            labels=numbers.astype(np.uint8),
        )


def jpeg(image: np.ndarray) -> bytes:
    """Encode an image [3, H, W] with little loss."""
    buffer = BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, format="JPEG", quality=98, subsampling=0)
    return buffer.getvalue()


def write_coco(folder: Path, train: int = 30, test: int = 24) -> None:
    """Write COCO's layout: image i shows category i % 3, every fourth one a second category too, every tenth none."""
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": 1, "name": "person"}, {"id": 7, "name": "train"}, {"id": 90, "name": "toothbrush"}]
    for part, count in (("train2017", train), ("val2017", test)):
        (folder / part).mkdir()
        images: list[dict[str, Any]] = []
        captions: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for number in range(count):
            image = 1000 + 7 * number
            pixels = np.full((3, 40, 60 - number % 3), (number * 37) % 256, dtype=np.uint8)
            (folder / part / f"{image:012d}.jpg").write_bytes(jpeg(pixels))
            images.append({"id": image, "file_name": f"{image:012d}.jpg"})
            words = ("one", "two", "three", "four", "five", "six")
            captions += [
                {"image_id": image, "caption": f"A photo, number {number}, of {word}."}
                for word in words[: 5 + number % 2]
            ]
            shown = [] if number % 10 == 9 else [categories[number % 3]]
            shown += [categories[(number + 1) % 3]] if number % 4 == 3 and shown else []
            objects += [{"image_id": image, "category_id": category["id"]} for category in shown for _ in range(2)]
        (folder / "annotations" / f"captions_{part}.json").write_text(
            json.dumps({"images": images, "annotations": captions})
        )
        (folder / "annotations" / f"instances_{part}.json").write_text(
            json.dumps({"images": images, "annotations": objects, "categories": categories})
        )
