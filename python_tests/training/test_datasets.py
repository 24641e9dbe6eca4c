"""Loaders of the paper's data sets, on tiny files in the real formats, and on the real files where they are."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.data_files import (
    cifar_images,
    write_cifar_batches,
    write_cifar_jpegs,
    write_coco,
    write_idx,
    write_mnist,
    write_spoken_digits,
    write_wav_recordings,
)
from training.real_data import real_data

from gapkernels.errors import UserError
from gapkernels.training.data import (
    AVMNISTData,
    CIFAR10Data,
    COCOData,
    Dataset,
    FeaturesData,
    ImageSpec,
    Split,
    VectorSpec,
    load_dataset,
)
from gapkernels.training.data.av_mnist import _log_spectrogram
from gapkernels.training.data.principal_components import principal_components, reduce_to
from gapkernels.training.data.transforms import RandomCaption, RandomCropFlip
from gapkernels.training.embeddings import NO_CLASS


def prepared(split: Split, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return split.prepare(split.batch(torch.arange(len(split))))


def assert_same(one: Dataset, other: Dataset) -> None:
    for left, right in ((one.train, other.train), (one.test, other.test)):
        assert torch.equal(left.labels, right.labels)
        assert torch.equal(left.ids, right.ids)
        for name, values in prepared(left).items():
            assert torch.equal(values, prepared(right)[name])


# CIFAR-10


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py", "."])
def test_cifar10_reads_the_original_download(tmp_path: Path, place: str) -> None:
    write_cifar_batches(tmp_path / "data" / place) if place != "." else write_cifar_batches(tmp_path / "data")
    dataset = load_dataset(CIFAR10Data(augment=False), tmp_path / "data")
    assert (len(dataset.train), len(dataset.test)) == (60, 12)
    images, labels = cifar_images(12, seed=1)
    assert torch.equal(dataset.train.modalities["image"][12:24], torch.from_numpy(images))
    assert dataset.train.labels[12:24].tolist() == labels.tolist()
    # Pixels are stored as bytes and standardised in the batch.
    assert dataset.train.modalities["image"].dtype == torch.uint8
    first = (images[0].astype(np.float64) / 255 - np.array([0.4914, 0.4822, 0.4465]).reshape(3, 1, 1)) / np.array(
        [0.2470, 0.2435, 0.2616]
    ).reshape(3, 1, 1)
    assert torch.allclose(prepared(dataset.train)["image"][12].double(), torch.from_numpy(first), atol=1e-5)
    assert dataset.specs["image"] == ImageSpec(3, 32, 32)


def test_cifar10_reads_jpeg_streams_alike(tmp_path: Path) -> None:
    write_cifar_batches(tmp_path / "one")
    write_cifar_jpegs(tmp_path / "two" / "cifar10")
    original = load_dataset(CIFAR10Data(), tmp_path / "one")
    repacked = load_dataset(CIFAR10Data(), tmp_path / "two")
    assert torch.equal(original.train.labels, repacked.train.labels)
    assert torch.equal(original.train.modalities["text"], repacked.train.modalities["text"])
    difference = original.train.modalities["image"].int() - repacked.train.modalities["image"].int()
    assert difference.abs().max() <= 3


def test_cifar10_text_is_the_class_name(tmp_path: Path) -> None:
    write_cifar_batches(tmp_path / "data")
    dataset = load_dataset(CIFAR10Data(), tmp_path / "data")
    texts = dataset.test.modalities["text"]
    assert len(texts.unique(dim=0)) == 10
    for label in range(10):
        assert len(texts[dataset.test.labels == label].unique(dim=0)) == 1
    assert torch.equal(dataset.test.ids, dataset.test.labels)


def test_a_cifar10_pickle_cannot_run_programs(tmp_path: Path) -> None:
    write_cifar_batches(tmp_path / "data")

    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "attacked",))

    (tmp_path / "data" / "data_batch_3").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match="data_batch_3, expected images and labels of CIFAR-10"):
        load_dataset(CIFAR10Data(), tmp_path / "data")
    assert not (tmp_path / "attacked").exists()


def test_damaged_cifar10_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"CIFAR-10 not found in .*: expected cifar-10-batches-py/data_batch_1 or "):
        load_dataset(CIFAR10Data(), tmp_path)
    with pytest.raises(UserError, match="name their folder with --data-dir"):
        load_dataset(CIFAR10Data())
    write_cifar_jpegs(tmp_path / "data")
    with np.load(tmp_path / "data" / "train-1.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "data" / "train-1.npz", **{**arrays, "labels": arrays["labels"][:-1]})
    with pytest.raises(UserError, match=r"train-1\.npz, expected .*29 labels, 31 offsets") as caught:
        load_dataset(CIFAR10Data(), tmp_path / "data")
    assert "\n" not in str(caught.value)
    arrays["jpeg"][: arrays["offsets"][1]] = 0
    np.savez(tmp_path / "data" / "train-1.npz", **arrays)
    with pytest.raises(UserError, match=r"train-1\.npz.*cannot decode an image"):
        load_dataset(CIFAR10Data(), tmp_path / "data")
    (tmp_path / "data" / "train-1.npz").write_bytes(b"an error page")
    with pytest.raises(UserError, match=r"train-1\.npz, expected .*\(it is no \.npz archive\)"):
        load_dataset(CIFAR10Data(), tmp_path / "data")
    (tmp_path / "data" / "test.npz").unlink()
    (tmp_path / "data" / "train-1.npz").unlink()
    with pytest.raises(UserError, match=r"train-1\.npz"):
        load_dataset(CIFAR10Data(), tmp_path / "data")


# AV-MNIST


def write_av_mnist(folder: Path, compressed: bool = True) -> None:
    write_mnist(folder / "mnist", compressed=compressed)
    write_spoken_digits(folder / "fsdd")


def test_av_mnist_pairs_by_class_and_keeps_the_splits_apart(tmp_path: Path) -> None:
    write_av_mnist(tmp_path)
    dataset = load_dataset(AVMNISTData(audio_snr_db=20), tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (40, 20)
    assert list(dataset.train.modalities) == ["image", "audio", "text"]
    for split in (dataset.train, dataset.test):
        audio = prepared(split)["audio"]
        assert audio.shape[1:] == (1, 32, 40)
        # Tones rise with the digit, so the loudest band must too, if the recording is of the image's class.
        loudest = audio.mean(dim=3).squeeze(1).argmax(dim=1)
        pitch = [int(loudest[split.labels == digit][0]) for digit in range(10)]
        assert pitch == sorted(pitch)
        assert len(set(pitch)) > 6
        for digit in range(10):
            assert (loudest[split.labels == digit] - pitch[digit]).abs().max() <= 1
    # 2 recordings per digit to train on, 1 to test on, each in 4 draws of noise.
    tables = [dataset.train.transforms["audio"].table, dataset.test.transforms["audio"].table]
    assert [len(table) for table in tables] == [80, 40]
    both = torch.cat(tables).flatten(1)
    assert len(both.unique(dim=0)) == 120
    # Images that share a recording, in whatever noise, are of one group, and of one digit.
    for split, count in ((dataset.train, 20), (dataset.test, 10)):
        assert split.groups is not None
        assert torch.equal(split.groups, split.modalities["audio"] % count)
        assert len(torch.stack([split.groups, split.labels]).unique(dim=1).T) == len(split.groups.unique())
    assert torch.equal(dataset.test.take(torch.tensor([3, 5])).groups, dataset.test.groups[[3, 5]])
    audio = prepared(dataset.train)["audio"]
    assert tables[0].mean().abs() < 1e-4
    assert tables[0].std() == pytest.approx(1, abs=1e-4)


def test_av_mnist_files_with_and_without_gz_and_wav_recordings_are_the_same_data(tmp_path: Path) -> None:
    write_av_mnist(tmp_path / "one")
    write_mnist(tmp_path / "two" / "MNIST" / "raw", compressed=False)
    write_spoken_digits(tmp_path / "two")
    config = AVMNISTData()
    assert_same(load_dataset(config, tmp_path / "one"), load_dataset(config, tmp_path / "two"))
    # Recordings in the original layout come in another order, so only what they sound like is compared.
    write_mnist(tmp_path / "three")
    write_wav_recordings(tmp_path / "three" / "recordings")
    wav = load_dataset(AVMNISTData(audio_snr_db=200), tmp_path / "three")
    npz = load_dataset(AVMNISTData(audio_snr_db=200), tmp_path / "one")
    for name in ("train", "test"):
        tables = [getattr(dataset, name).transforms["audio"].table for dataset in (wav, npz)]
        one, other = (sorted(table.flatten(1).mean(dim=1).tolist()) for table in tables)
        assert one == pytest.approx(other, abs=1e-3)


def test_av_mnist_depends_on_its_seed_alone(tmp_path: Path) -> None:
    write_av_mnist(tmp_path)
    torch.manual_seed(1)
    one = load_dataset(AVMNISTData(), tmp_path)
    torch.manual_seed(2)
    assert_same(one, load_dataset(AVMNISTData(), tmp_path))
    other = load_dataset(AVMNISTData(pairing_seed=1), tmp_path)
    assert not torch.equal(prepared(one.train)["audio"], prepared(other.train)["audio"])


@pytest.mark.parametrize("energy", [0.25, 0.75, 1.0])
def test_principal_components_keep_the_energy_asked_for(energy: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(200, 1, 5, 4, generator=generator) * torch.linspace(0.1, 3, 20).view(1, 1, 5, 4) + 2
    basis = principal_components(images, energy)
    reduced = reduce_to(images, basis)

    def variance(x: torch.Tensor) -> float:
        return float((x - x.mean(dim=0)).square().sum())

    kept = variance(reduced) / variance(images)
    fewer = reduce_to(images, basis._replace(directions=basis.directions[:, :-1]))
    assert kept >= energy - 1e-5
    assert variance(fewer) / variance(images) < energy
    if energy == 1.0:
        assert torch.allclose(reduced, images, atol=1e-4)


def test_a_spectrogram_shows_a_tone_where_and_when_it_sounds() -> None:
    time = torch.arange(8000) / 8000
    high = torch.sin(2 * math.pi * 3000 * time) * (time > 0.5)
    low = torch.sin(2 * math.pi * 400 * time) * (time <= 0.5)
    spectrogram = _log_spectrogram((high + low)[None])[0]
    assert spectrogram.shape == (32, 40)
    early, late = spectrogram[:, 5:15].mean(dim=1).argmax(), spectrogram[:, 25:35].mean(dim=1).argmax()
    # Bands are evenly spaced on the mel scale: 2595 log10(1 + f / 700), 2146 at 4 kHz.
    for band, frequency in ((early, 400), (late, 3000)):
        mel = 2595 * math.log10(1 + frequency / 700)
        assert abs(int(band) + 1 - mel / 2146 * 33) <= 1


def test_damaged_av_mnist_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Free Spoken Digit Dataset not found in .*: expected fsdd/fsdd\.npz or "):
        load_dataset(AVMNISTData(), tmp_path)
    write_spoken_digits(tmp_path)
    with pytest.raises(UserError, match=r"MNIST's train images not found in .*: expected mnist/train-images"):
        load_dataset(AVMNISTData(), tmp_path)
    write_mnist(tmp_path, compressed=False)
    whole = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    for content, reason in (
        (whole[:-5], "31360 bytes announced, 31355 found"),
        (b"\x89PNG" + whole[4:], "89504e47"),
        (b"", "begins with"),
    ):
        (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(UserError, match=f"train-images-idx3-ubyte, expected an idx file.*{reason}"):
            load_dataset(AVMNISTData(), tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((39, 28, 28)), compressed=False)
    with pytest.raises(UserError, match="39 train images and 40 labels"):
        load_dataset(AVMNISTData(), tmp_path)


# MS-COCO


@pytest.mark.parametrize("place", ["", "coco"])
def test_coco_reads_its_layout(tmp_path: Path, place: str) -> None:
    write_coco(tmp_path / "data" / place)
    dataset = load_dataset(COCOData(image_size=16), tmp_path / "data")
    assert (len(dataset.train), len(dataset.test)) == (30, 24)
    assert dataset.train.modalities["image"].shape == (30, 3, 16, 16)
    grey = dataset.train.modalities["image"].float().mean(dim=(1, 2, 3))
    assert torch.allclose(grey, torch.tensor([float((number * 37) % 256) for number in range(30)]), atol=2)
    expected = [NO_CLASS if n % 10 == 9 or n % 4 == 3 else n % 3 for n in range(30)]
    assert dataset.train.labels.tolist() == expected
    assert dataset.class_names == ("person", "train", "toothbrush")
    assert dataset.test.ids.tolist() == list(range(24))


def test_coco_draws_a_caption_in_training_and_takes_the_first_in_testing(tmp_path: Path) -> None:
    write_coco(tmp_path)
    dataset = load_dataset(COCOData(image_size=16), tmp_path)
    choices = dataset.train.modalities["text"]
    assert choices.shape[:2] == (30, 5)
    drawn = [prepared(dataset.train, seed)["text"] for seed in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(drawn[0], prepared(dataset.train, 0)["text"])
    for tokens in drawn:
        assert (choices == tokens[:, None]).all(dim=2).any(dim=1).all()
    assert torch.equal(prepared(dataset.test)["text"], dataset.test.modalities["text"][:, 0])


def test_every_caption_is_drawn_equally_often() -> None:
    torch.manual_seed(0)
    captions = torch.arange(5).view(1, 5, 1).expand(5000, 5, 3)
    counts = RandomCaption()(captions)[:, 0].bincount(minlength=5)
    assert ((counts - 1000).abs() < 150).all()


def test_damaged_coco_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MS-COCO not found in .*: expected annotations/captions_train2017\.json"):
        load_dataset(COCOData(), tmp_path)
    write_coco(tmp_path)
    next((tmp_path / "train2017").iterdir()).write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot decode the image .*train2017"):
        load_dataset(COCOData(image_size=16), tmp_path)
    for image in (tmp_path / "train2017").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="30 of 30 images of train2017 are missing, the first is"):
        load_dataset(COCOData(image_size=16), tmp_path)
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": []}))
    write_coco(tmp_path / "again")
    (tmp_path / "again" / "annotations" / "captions_train2017.json").write_text("{")
    with pytest.raises(UserError, match=r"captions_train2017\.json, expected COCO annotations"):
        load_dataset(COCOData(image_size=16), tmp_path / "again")


# Features


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_come_from_a_file(tmp_path: Path, suffix: str) -> None:
    from safetensors.numpy import save_file

    arrays = {
        "image": np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32),
        "text": np.random.default_rng(1).normal(size=(50, 9)).astype(np.float32),
        "labels": np.arange(50) % 5,
        "ids": np.arange(50) // 2,
    }
    path = tmp_path / f"all{suffix}"
    np.savez(path, **arrays) if suffix == ".npz" else save_file(arrays, path)
    dataset = load_dataset(FeaturesData(train_file=path.name, test_fraction=0.2), tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (40, 10)
    assert dataset.specs == {"image": VectorSpec(6), "text": VectorSpec(9)}
    # Samples of one id, such as two captions of one image, never fall on both sides.
    assert not set(dataset.train.ids.tolist()) & set(dataset.test.ids.tolist())
    rows = torch.from_numpy(arrays["image"])
    for split in (dataset.train, dataset.test):
        for values, label in zip(split.modalities["image"], split.labels, strict=True):
            assert int((rows == values).all(dim=1).nonzero()) % 5 == label
    again = load_dataset(FeaturesData(train_file=path.name, test_fraction=0.2), tmp_path)
    assert_same(dataset, again)


def test_features_of_one_group_stay_together(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    groups = np.repeat([f"recording {number}" for number in range(12)], 5)
    np.savez(tmp_path / "all.npz", audio=rows, text=rows, ids=np.arange(60), groups=groups)
    dataset = load_dataset(FeaturesData(train_file="all.npz", test_fraction=0.25), tmp_path)
    assert dataset.train.groups is not None
    assert dataset.test.groups is not None
    assert (len(dataset.train), len(dataset.test)) == (45, 15)
    assert not set(dataset.train.groups.tolist()) & set(dataset.test.groups.tolist())


def test_features_without_labels_have_no_classes(tmp_path: Path) -> None:
    train = {"image": np.ones((4, 3)), "text": np.ones((4, 2))}
    np.savez(tmp_path / "train.npz", **train)
    np.savez(tmp_path / "test.npz", image=np.ones((3, 3)), text=np.ones((3, 2)))
    dataset = load_dataset(FeaturesData(train_file="train.npz", test_file="test.npz"), tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (4, 3)
    assert dataset.train.labels.tolist() == [NO_CLASS] * 4
    assert dataset.class_names == ()
    with pytest.raises(UserError, match="no embeddings at"):
        load_dataset(FeaturesData(train_file="absent.npz"), tmp_path)
    np.savez(tmp_path / "test.npz", image=np.ones((3, 3)), text=np.ones((3, 5)))
    with pytest.raises(UserError, match=r"the training file holds features .*, the test file"):
        load_dataset(FeaturesData(train_file="train.npz", test_file="test.npz"), tmp_path)


# Transforms


def test_crops_are_windows_of_the_padded_image() -> None:
    torch.manual_seed(0)
    images = torch.arange(1, 2 * 3 * 5 * 4 + 1).view(2, 3, 5, 4).repeat(40, 1, 1, 1)
    out = RandomCropFlip(padding=2)(images)
    assert out.shape == images.shape
    places = set()
    for image, crop in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(image, [2, 2, 2, 2])
        found = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if torch.equal(window := padded[:, top : top + 5, left : left + 4], crop.flip(2) if mirrored else crop)
            and window.numel()
        ]
        assert len(found) == 1
        places |= set(found)
    # 80 images at 50 places: most places must occur.
    assert len(places) > 30
    assert {mirrored for _, _, mirrored in places} == {False, True}
    assert torch.equal(RandomCropFlip(padding=0, flip=False)(images), images)


# The real files


@pytest.mark.slow
def test_the_real_cifar10() -> None:
    dataset = load_dataset(CIFAR10Data(), real_data("cifar10"))
    assert (len(dataset.train), len(dataset.test)) == (50000, 10000)
    assert dataset.train.labels.bincount().tolist() == [5000] * 10
    means = dataset.train.modalities["image"].float().mean(dim=(0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)


@pytest.mark.slow
def test_the_real_av_mnist() -> None:
    dataset = load_dataset(AVMNISTData(), real_data("mnist", "fsdd"))
    assert (len(dataset.train), len(dataset.test)) == (60000, 10000)
    images = dataset.train.modalities["image"][:5000].flatten(1)
    # A quarter of the energy is four principal components.
    assert int(torch.linalg.matrix_rank(images - images.mean(dim=0), rtol=1e-4)) == 4


def test_the_real_coco() -> None:
    dataset = load_dataset(COCOData(image_size=32), real_data("coco_mini"))
    assert (len(dataset.train), len(dataset.test)) == (50, 51)
    assert (dataset.test.labels != NO_CLASS).sum() == 5
    assert len(dataset.class_names) == 80
