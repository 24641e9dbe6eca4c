from pathlib import Path

import pytest
import torch

from gapkernels.errors import UserError
from gapkernels.training.data import DigitHalvesData, DigitsData, ImageSpec, TextSpec, load_dataset
from gapkernels.training.data.digits import DIGIT_NAMES
from gapkernels.training.data.tokenizer import PADDING, UNKNOWN, Tokenizer


def test_digits_are_the_same_every_time() -> None:
    first, second = load_dataset(DigitsData()), load_dataset(DigitsData())
    for one, other in ((first.train, second.train), (first.test, second.test)):
        assert torch.equal(one.labels, other.labels)
        assert all(torch.equal(one.modalities[name], other.modalities[name]) for name in ("image", "text"))


def test_digits_hold_every_image_once_and_standardised() -> None:
    dataset = load_dataset(DigitsData())
    assert len(dataset.train) + len(dataset.test) == 1797
    images = dataset.train.modalities["image"]
    assert images.shape[1:] == (1, 8, 8)
    assert images.mean().abs() < 1e-5
    assert images.std() == pytest.approx(1.0, abs=1e-5)
    both = torch.cat([images, dataset.test.modalities["image"]]).flatten(1)
    # Whoever wrote an image, no test image is a copy of a training image.
    assert len(both.unique(dim=0)) == len(both)
    for split in (dataset.train, dataset.test):
        assert set(split.labels.tolist()) == set(range(10))


def test_digits_text_is_the_name_of_the_label() -> None:
    dataset = load_dataset(DigitsData())
    tokenizer = Tokenizer.from_captions(DIGIT_NAMES, level="character")
    names = [dataset.class_names[label] for label in dataset.test.labels]
    assert torch.equal(dataset.test.modalities["text"], tokenizer.encode(names))
    assert torch.equal(dataset.test.ids, dataset.test.labels)
    assert dataset.specs["image"] == ImageSpec(channels=1, height=8, width=8)
    assert dataset.specs["text"] == TextSpec(vocabulary_size=tokenizer.size, length=5)


def test_halves_are_those_of_the_digits_in_few_components() -> None:
    whole, halves = load_dataset(DigitsData()), load_dataset(DigitHalvesData())
    assert torch.equal(
        torch.cat([whole.train.labels, whole.test.labels]), torch.cat([halves.train.labels, halves.test.labels])
    )
    assert (len(halves.train), len(halves.test)) == (1029, 768)
    exact = load_dataset(DigitHalvesData(image_energy=1.0))
    images = torch.cat([whole.train.modalities["image"], whole.test.modalities["image"]])
    for name, half in (("left", images[..., :4]), ("right", images[..., 4:])):
        for dataset, components in ((halves, 3), (exact, 32)):
            values = dataset.train.modalities[name]
            assert values.shape == (1029, 1, 8, 4)
            assert values.mean().abs() < 1e-5
            assert values.std() == pytest.approx(1.0, abs=1e-5)
            # Pixels that are the same everywhere leave less than 32 directions.
            centred = (values - values.mean(dim=0)).flatten(1)
            assert torch.linalg.matrix_rank(centred, rtol=1e-4) <= components
        # All energy kept: the half itself, up to one shift and one scale.
        kept = torch.cat([exact.train.modalities[name], exact.test.modalities[name]])
        assert torch.corrcoef(torch.stack([kept.flatten(), half.flatten()]))[0, 1] > 1 - 1e-5
        assert dataset.specs[name] == ImageSpec(channels=1, height=8, width=4)


def test_samples_can_be_limited() -> None:
    full, few = load_dataset(DigitsData()), load_dataset(DigitsData(train_samples=10, test_samples=20))
    assert (len(few.train), len(few.test)) == (10, 20)
    assert torch.equal(few.train.modalities["image"], full.train.modalities["image"][:10])
    with pytest.raises(UserError, match=r"data\.train_samples is 9999, but the split has 516"):
        load_dataset(DigitsData(train_samples=9999))


def test_a_missing_data_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no data folder .*nowhere"):
        load_dataset(DigitsData(), tmp_path / "nowhere")


def test_character_tokens_spell_the_caption() -> None:
    tokenizer = Tokenizer.from_captions(["abc", "ab", "a"], level="character")
    assert tokenizer.vocabulary == ("a", "b", "c")
    assert tokenizer.size == 5
    assert tokenizer.encode(["cab", "B", "", "axb"]).tolist() == [
        [4, 2, 3],
        [3, PADDING, PADDING],
        [PADDING] * 3,
        [2, UNKNOWN, 3],
    ]


def test_word_tokens_keep_punctuation_apart_and_cut_long_captions() -> None:
    tokenizer = Tokenizer.from_captions(["a dog, a cat", "A bird"], level="word", max_length=4)
    assert tokenizer.vocabulary == ("a", ",", "bird", "cat", "dog")
    tokens = tokenizer.encode(["A dog, a cat", "a zebra"])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[2, 6, 3, 2], [2, UNKNOWN, PADDING, PADDING]]


def test_digit_names_have_distinct_tokens() -> None:
    tokens = Tokenizer.from_captions(DIGIT_NAMES, level="character").encode(DIGIT_NAMES)
    assert len(tokens.unique(dim=0)) == 10
    assert (tokens != UNKNOWN).all()


def test_a_vocabulary_needs_captions() -> None:
    with pytest.raises(ValueError, match="no token"):
        Tokenizer.from_captions(["", ""], level="word")
