import pytest
import torch

from gapkernels.training.config import ImageCNNConfig, Model, TextTransformerConfig
from gapkernels.training.data import ImageSpec, TextSpec
from gapkernels.training.encoders import ImageCNN, MultimodalModel, TextTransformer
from gapkernels.training.errors import UserError

IMAGE, TEXT = ImageSpec(channels=3, height=8, width=8), TextSpec(vocabulary_size=7, length=5)


def test_the_model_projects_every_modality_into_one_space() -> None:
    encoders = {
        "image": ImageCNNConfig(kind="image-cnn", width=4),
        "audio": ImageCNNConfig(kind="image-cnn", width=6, depth=1),
        "text": TextTransformerConfig(kind="text-transformer", width=8, heads=2),
    }
    model = MultimodalModel(Model(embed_dim=12, encoders=encoders), {"image": IMAGE, "audio": IMAGE, "text": TEXT})
    inputs = {"image": torch.randn(4, 3, 8, 8), "audio": torch.randn(4, 3, 16, 4), "text": torch.randint(0, 7, (4, 5))}
    embeddings = model(inputs)
    assert list(embeddings) == ["image", "audio", "text"]
    assert all(values.shape == (4, 12) for values in embeddings.values())
    sum(values.sum() for values in embeddings.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_image_is_encoded_alone(depth: int) -> None:
    """Embeddings do not depend on the rest of the batch, or micro-batches would change the loss."""
    encoder = ImageCNN(ImageCNNConfig(kind="image-cnn", width=4, depth=depth), IMAGE)
    images = torch.randn(6, 3, 8, 8)
    assert encoder(images).shape == (6, encoder.output_width)
    torch.testing.assert_close(encoder(images)[2:3], encoder(images[2:3]), rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_a_caption() -> None:
    torch.manual_seed(0)
    encoder = TextTransformer(TextTransformerConfig(kind="text-transformer", width=8, heads=2), TEXT).eval()
    tokens = torch.tensor([[2, 3, 0, 0, 0]])
    before = encoder(tokens)
    with torch.no_grad():
        encoder.tokens.weight[0] += 10.0
    torch.testing.assert_close(encoder(tokens), before)


def test_an_empty_caption_gives_numbers() -> None:
    encoder = TextTransformer(TextTransformerConfig(kind="text-transformer", width=8, heads=2), TEXT)
    assert encoder(torch.tensor([[0, 0, 0, 0, 0], [2, 0, 0, 0, 0]])).isfinite().all()


def test_word_order_matters() -> None:
    encoder = TextTransformer(TextTransformerConfig(kind="text-transformer", width=8, heads=2), TEXT).eval()
    one, other = encoder(torch.tensor([[2, 3, 4, 0, 0], [4, 3, 2, 0, 0]]))
    assert not torch.allclose(one, other)


def test_encoders_must_fit_the_data_set() -> None:
    cnn = ImageCNNConfig(kind="image-cnn", width=4)
    with pytest.raises(UserError, match="names the modalities image, text, the data set has audio, image"):
        MultimodalModel(Model(encoders={"image": cnn, "text": cnn}), {"image": IMAGE, "audio": IMAGE})
    with pytest.raises(UserError, match=r"model\.encoders\.text: image-cnn cannot read"):
        MultimodalModel(Model(encoders={"image": cnn, "text": cnn}), {"image": IMAGE, "text": TEXT})
