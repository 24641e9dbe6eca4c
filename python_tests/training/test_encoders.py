import sys
import types

import pytest
import torch
from torch import nn

from gapkernels.errors import UserError
from gapkernels.training.config import (
    EncoderConfig,
    FastCNNConfig,
    ImageCNNConfig,
    MLPConfig,
    Model,
    OpenCLIPConfig,
    ResNetConfig,
    SpectrogramCNNConfig,
    TextTransformerConfig,
    ViTConfig,
)
from gapkernels.training.data import ImageSpec, TextSpec, VectorSpec
from gapkernels.training.encoders import (
    FastCNN,
    ImageCNN,
    MultimodalModel,
    ResNet,
    SpectrogramCNN,
    TextTransformer,
    _build_encoder,
)
from gapkernels.training.encoders.image import _PointwiseConv

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


ENCODERS = [
    (ResNetConfig(kind="resnet18", width=8), ImageSpec(3, 16, 16), 64),
    (ResNetConfig(kind="resnet50", width=8, norm="group"), ImageSpec(3, 16, 16), 256),
    (ResNetConfig(kind="resnet18", width=8, stem="large"), ImageSpec(3, 64, 48), 64),
    (ViTConfig(kind="vit", patch_size=4, width=12, depth=2, heads=3), ImageSpec(3, 16, 8), 12),
    (SpectrogramCNNConfig(kind="spectrogram-cnn", width=4, depth=2), ImageSpec(1, 12, 10), 8 * 3),
    (FastCNNConfig(kind="fast-cnn", widths=(8, 12, 6)), ImageSpec(3, 16, 20), 6),
    (MLPConfig(kind="mlp", width=10, depth=2, dropout=0.1), VectorSpec(7), 10),
]


def sample_inputs(spec: ImageSpec | VectorSpec, samples: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (spec.channels, spec.height, spec.width) if isinstance(spec, ImageSpec) else (spec.width,)
    return torch.randn(samples, *shape, generator=generator)


@pytest.mark.parametrize(("config", "spec", "width"), ENCODERS, ids=lambda value: getattr(value, "kind", ""))
def test_every_encoder_learns_and_in_evaluation_reads_each_sample_alone(
    config: EncoderConfig, spec: ImageSpec | VectorSpec, width: int
) -> None:
    encoder = _build_encoder("thing", config, spec)
    inputs = sample_inputs(spec)
    features = encoder(inputs)
    assert features.shape == (6, width)
    assert encoder.output_width == width
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    encoder.eval()
    torch.testing.assert_close(encoder(inputs)[2:3], encoder(inputs[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "millions"),
    # He et al.'s networks with 1000 classes have 11.69 and 25.56 million parameters, 0.51 and 2.05 of them in the last
    # layer; the stem for small images has 3x3 instead of 7x7 weights.
    [("resnet18", 11.69 - 0.513), ("resnet50", 25.557 - 2.049)],
)
def test_resnets_have_the_published_size(kind: str, millions: float) -> None:
    with torch.device("meta"):
        large = ResNet(ResNetConfig(kind=kind, stem="large"), ImageSpec(3, 224, 224))
        small = ResNet(ResNetConfig(kind=kind, stem="small"), ImageSpec(3, 32, 32))
    count = sum(parameter.numel() for parameter in large.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=5e-3)
    assert count - sum(parameter.numel() for parameter in small.parameters()) == 64 * 3 * (49 - 9)


def test_the_fast_cnn_has_the_published_size() -> None:
    """airbench94 has 1.97 million parameters, 288 of them whitening filters and 2,560 its classifier."""
    encoder = FastCNN(FastCNNConfig(kind="fast-cnn"), ImageSpec(3, 32, 32))
    count = sum(parameter.numel() for parameter in encoder.parameters())
    # Weights of its batch norms are fixed; ours are learned.
    assert (count + 288 + 2560) / 1e6 == pytest.approx(1.97, abs=5e-3)


def test_calibration_whitens_the_patches_of_the_images() -> None:
    torch.manual_seed(0)
    encoder = FastCNN(FastCNNConfig(kind="fast-cnn", widths=(8,)), ImageSpec(3, 12, 12))
    # Smooth images whose channels are alike: patches vary almost along one direction.
    images = torch.nn.functional.interpolate(torch.randn(50, 1, 3, 3), (12, 12), mode="bilinear")
    images = images + 0.3 * torch.randn(50, 3, 12, 12)
    encoder.calibrate(images)
    responses = torch.nn.functional.conv2d(images, encoder.filters).permute(0, 2, 3, 1).reshape(-1, 24)
    covariance = responses[:, :12].T @ responses[:, :12] / len(responses)
    torch.testing.assert_close(covariance, torch.eye(12), rtol=0.0, atol=1e-2)
    assert torch.equal(responses[:, 12:], -responses[:, :12])


def test_the_fast_cnn_needs_a_position_after_its_last_group() -> None:
    assert FastCNN(FastCNNConfig(kind="fast-cnn"), ImageSpec(1, 9, 9))(torch.randn(2, 1, 9, 9)).shape == (2, 256)
    with pytest.raises(UserError, match="3 groups need images of 9 pixels or more, got 9x8"):
        FastCNN(FastCNNConfig(kind="fast-cnn"), ImageSpec(1, 9, 8))


def test_group_norm_makes_a_resnet_independent_of_the_batch() -> None:
    inputs = sample_inputs(ImageSpec(3, 16, 16))
    for norm, alone in (("group", True), ("batch", False)):
        torch.manual_seed(0)
        encoder = ResNet(ResNetConfig(kind="resnet18", width=8, norm=norm), ImageSpec(3, 16, 16))
        assert torch.allclose(encoder(inputs)[:2], encoder(inputs[:2]), atol=1e-4) == alone


def test_a_resnet_starts_as_the_identity_of_its_blocks() -> None:
    torch.manual_seed(0)
    encoder = ResNet(ResNetConfig(kind="resnet18", width=8), ImageSpec(3, 16, 16))
    x = torch.randn(2, 8, 5, 5).relu()
    assert torch.equal(encoder.blocks[0](x), x)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_pointwise_convolution_is_the_strided_one(step: int) -> None:
    """At a shape where the strided one itself crashes in its backward pass, see `_PointwiseConv`."""
    torch.manual_seed(0)
    convolution = _PointwiseConv(8, 16, step, bias=True).to(memory_format=torch.channels_last)
    x = torch.randn(25, 8, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = convolution(x)
    expected = torch.einsum("oi,nihw->nohw", convolution.weight[:, :, 0, 0], x[:, :, ::step, ::step])
    expected = expected + convolution.bias[:, None, None]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-3, atol=1e-4)


def test_a_spectrogram_cnn_tells_frequencies_apart_but_not_times() -> None:
    torch.manual_seed(0)
    encoder = SpectrogramCNN(SpectrogramCNNConfig(kind="spectrogram-cnn", width=4, depth=1), ImageSpec(1, 8, 32)).eval()
    sound = torch.zeros(1, 1, 8, 32)
    sound[..., 2, 10:14] = 1
    later, higher = sound.roll(8, dims=3), sound.roll(4, dims=2)
    assert torch.allclose(encoder(sound), encoder(later), atol=1e-5)
    assert not torch.allclose(encoder(sound), encoder(higher), atol=1e-2)


@pytest.mark.parametrize(
    ("config", "spec", "message"),
    [
        (ViTConfig(kind="vit", patch_size=5), ImageSpec(3, 16, 15), r"patch_size \(5\) must divide .*16x15"),
        (SpectrogramCNNConfig(kind="spectrogram-cnn", depth=4), ImageSpec(1, 32, 9), "halves a spectrogram of 32x9"),
        (MLPConfig(kind="mlp"), ImageSpec(3, 8, 8), r"mlp cannot read this modality \(ImageSpec\)"),
        (OpenCLIPConfig(kind="open-clip-image"), ImageSpec(1, 8, 8), "3 channels, these have 1"),
    ],
)
def test_encoders_that_do_not_fit_are_named(config: EncoderConfig, spec: ImageSpec, message: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.encoders\.thing: .*{message}"):
        _build_encoder("thing", config, spec)


class FakeOpenCLIP(types.ModuleType):
    """The parts of open_clip in use, over a model whose features can be foretold."""

    class Model(nn.Module):
        context_length, vocab_size = 8, 50

        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 6))
            self.visual.image_size = (4, 4)
            self.embedding = nn.Embedding(50, 5)

        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            assert tokens.shape[1] == self.context_length
            # As CLIP: what stands where the largest number stands, after everything before it.
            end = tokens.argmax(dim=1)
            return self.embedding(tokens).cumsum(dim=1)[torch.arange(len(tokens)), end]

    def list_models(self) -> list[str]:
        return ["Tiny"]

    def create_model(self, name: str, pretrained: str | None = None) -> nn.Module:
        assert (name, pretrained) == ("Tiny", None)
        return self.Model()


def test_open_clip_towers_read_images_and_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", FakeOpenCLIP("open_clip"))
    image = _build_encoder("image", OpenCLIPConfig(kind="open-clip-image", model="Tiny"), ImageSpec(3, 8, 8))
    assert image.output_width == 6
    assert image(torch.randn(2, 3, 8, 8)).shape == (2, 6)
    text = _build_encoder("text", OpenCLIPConfig(kind="open-clip-text", model="Tiny"), TextSpec(20, 6))
    assert text.output_width == 5
    tokens = torch.tensor([[3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 11]])
    embedding = text.model.embedding.weight
    expected = torch.stack([embedding[[3, 4, 5, 49]].sum(0), embedding[[6, 7, 8, 9, 10, 11, 49]].sum(0)])
    torch.testing.assert_close(text(tokens), expected)
    assert not list(text.model.visual.parameters())
    with pytest.raises(UserError, match="reads up to 8 tokens out of 50"):
        _build_encoder("text", OpenCLIPConfig(kind="open-clip-text", model="Tiny"), TextSpec(20, 9))
    with pytest.raises(UserError, match="open_clip knows no model 'Huge'"):
        _build_encoder("image", OpenCLIPConfig(kind="open-clip-image", model="Huge"), ImageSpec(3, 8, 8))


def test_without_open_clip_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match="needs open_clip: pip install open_clip_torch"):
        _build_encoder("image", OpenCLIPConfig(kind="open-clip-image"), ImageSpec(3, 8, 8))
