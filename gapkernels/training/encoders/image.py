"""Encoders of images and of spectrograms, which are images with one channel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapkernels.errors import UserError
from gapkernels.training.config import FastCNNConfig, ImageCNNConfig, ResNetConfig, SpectrogramCNNConfig, ViTConfig
from gapkernels.training.data import ImageSpec
from gapkernels.training.encoders.base import Encoder

_GROUPS = 8
_STAGE_STRIDES = (1, 2, 2, 2)
_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}

_Norm = Callable[[int], nn.Module]


class ImageCNN(Encoder):
    """Residual convolutional encoder: each stage after the first halves the resolution and doubles the channels.

    Group norm instead of batch norm: a sample's embedding must not depend on the other samples of its batch, or the
    loss could not be computed in micro-batches.
    """

    def __init__(self, config: ImageCNNConfig, spec: ImageSpec) -> None:
        super().__init__()
        widths = [config.width * 2**stage for stage in range(config.depth)]
        self.stem = nn.Conv2d(spec.channels, config.width, kernel_size=3, stride=config.stem_stride, padding=1)
        self.stages = nn.Sequential(
            *(
                _ResidualStage(width_in, width_out, stride=1 if stage == 0 else 2)
                for stage, (width_in, width_out) in enumerate(zip([config.width, *widths], widths, strict=False))
            )
        )
        self.output_width = widths[-1]
        # The faster layout for convolutions, on CPUs and GPUs alike.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [N, C, H, W] into features [N, output_width]."""
        return self.stages(self.stem(images)).mean(dim=(2, 3))


class _PointwiseConv(nn.Conv2d):
    """A 1x1 convolution that reads every `step`-th position.

    The positions are cut out first: on the CPU the backward pass of oneDNN 3.12's own strided 1x1 convolution crashes
    for some shapes in the channels-last layout (2 images of 64x64 pixels, 8 to 16 channels, on an AVX-512 processor).
    """

    def __init__(self, width_in: int, width_out: int, step: int, bias: bool) -> None:
        super().__init__(width_in, width_out, kernel_size=1, bias=bias)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.step, :: self.step])


class _ResidualStage(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.GroupNorm(math.gcd(8, width_in), width_in),
            nn.GELU(),
            nn.Conv2d(width_in, width_out, kernel_size=3, stride=stride, padding=1),
            nn.GroupNorm(math.gcd(8, width_out), width_out),
            nn.GELU(),
            nn.Conv2d(width_out, width_out, kernel_size=3, padding=1),
        )
        same_shape = width_in == width_out and stride == 1
        self.shortcut = nn.Identity() if same_shape else _PointwiseConv(width_in, width_out, stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class FastCNN(Encoder):
    """The network of the CIFAR-10 speed runs: 2x2 patches whitened, then groups of two 3x3 convolutions.

    The first layer is not learned: its filters are the principal components of the images' 2x2 patches, scaled to unit
    variance, and their negatives, since GELU lets one sign pass. A group halves the resolution after its first
    convolution; convolutions begin as the identity of their first channels. The maximum over the last positions is the
    feature. Batch norm reads the whole batch, so micro-batches change the loss.

    Source:
        K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498, sections 3.1 to 3.3; widths
        64-256-256 there. The optimiser and its tricks, label smoothing and averages over views of a test image are not
        taken over.
    """

    calibration_samples = 5000
    filters: Tensor

    def __init__(self, config: FastCNNConfig, spec: ImageSpec) -> None:
        super().__init__()
        smallest = 2 ** len(config.widths) + 1
        if min(spec.height, spec.width) < smallest:
            raise UserError(
                f"{len(config.widths)} groups need images of {smallest} pixels or more, got {spec.height}x{spec.width}"
            )
        patch = 4 * spec.channels
        self.register_buffer("filters", self._with_negatives(torch.eye(patch).view(patch, spec.channels, 2, 2)))
        self.bias = nn.Parameter(torch.zeros(2 * patch))
        self.groups = nn.Sequential(
            *(
                nn.Sequential(
                    self._convolution(width_in, width),
                    nn.MaxPool2d(2),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    self._convolution(width, width),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                )
                for width_in, width in itertools.pairwise([2 * patch, *config.widths])
            )
        )
        self.output_width = config.widths[-1]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def calibrate(self, inputs: Tensor) -> None:
        """Set the whitening filters from images [N, C, H, W]."""
        channels = inputs.shape[1]
        patches = inputs.double().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * channels)
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        # Variances of normalised pixels are about 1; the floor keeps what hardly varies, as in a grey image, from
        # becoming noise.
        whitening = (directions / (variances + 5e-4).sqrt()).T.reshape(-1, channels, 2, 2)
        self.filters.copy_(self._with_negatives(whitening))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [N, C, H, W] into features [N, output_width]."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.groups(F.gelu(F.conv2d(images, self.filters, self.bias))).amax(dim=(2, 3))

    @staticmethod
    def _with_negatives(filters: Tensor) -> Tensor:
        return torch.cat([filters, -filters])

    @staticmethod
    def _convolution(width_in: int, width_out: int) -> nn.Conv2d:
        convolution = nn.Conv2d(width_in, width_out, kernel_size=3, padding=1, bias=False)
        nn.init.dirac_(convolution.weight[:width_in])
        return convolution


class ResNet(Encoder):
    """Residual network with 18 or 50 layers; the mean over the last stage's positions is the feature.

    With the small stem (a 3x3 convolution and no pooling) it reads images of about 32 pixels, as is usual for CIFAR;
    with the large one (a 7x7 convolution with stride 2 and max pooling) photographs.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385; the stride of a bottleneck is in
        its 3x3 convolution, as in later implementations, and each residual branch starts at zero (Goyal et al.,
        arXiv 1706.02677, section 5.1).
    """

    def __init__(self, config: ResNetConfig, spec: ImageSpec) -> None:
        super().__init__()
        norm: _Norm = nn.BatchNorm2d if config.norm == "batch" else lambda width: nn.GroupNorm(_GROUPS, width)
        block = _BasicBlock if config.kind == "resnet18" else _Bottleneck
        kernel_size, stride = (3, 1) if config.stem == "small" else (7, 2)
        self.stem = nn.Sequential(
            nn.Conv2d(spec.channels, config.width, kernel_size, stride, padding=kernel_size // 2, bias=False),
            norm(config.width),
            nn.ReLU(inplace=True),
            *([nn.MaxPool2d(kernel_size=3, stride=2, padding=1)] if config.stem == "large" else []),
        )
        blocks: list[nn.Module] = []
        width_in = config.width
        for stage, (count, stage_stride) in enumerate(zip(_BLOCKS[config.kind], _STAGE_STRIDES, strict=True)):
            width = config.width * 2**stage
            for number in range(count):
                blocks.append(block(width_in, width, stage_stride if number == 0 else 1, norm))
                width_in = width * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.output_width = width_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [N, C, H, W] into features [N, output_width]."""
        return self.blocks(self.stem(images.contiguous(memory_format=torch.channels_last))).mean(dim=(2, 3))


class _ResidualBlock(nn.Module):
    """Adds a residual branch to its input, or to a projection of it where the shape changes."""

    expansion: int

    def __init__(self, residual: nn.Sequential, width_in: int, width_out: int, stride: int, norm: _Norm) -> None:
        super().__init__()
        self.residual = residual
        last_norm = residual[-1]
        assert isinstance(last_norm, nn.BatchNorm2d | nn.GroupNorm)
        nn.init.zeros_(last_norm.weight)
        same_shape = width_in == width_out and stride == 1
        self.shortcut = (
            nn.Identity()
            if same_shape
            else nn.Sequential(
                nn.Conv2d(width_in, width_out, kernel_size=1, stride=stride, bias=False), norm(width_out)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.residual(x))


class _BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, norm: _Norm) -> None:
        residual = nn.Sequential(
            nn.Conv2d(width_in, width, kernel_size=3, stride=stride, padding=1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            norm(width),
        )
        super().__init__(residual, width_in, width, stride, norm)


class _Bottleneck(_ResidualBlock):
    """A 3x3 convolution between two 1x1 ones that narrow and widen the channels."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, norm: _Norm) -> None:
        width_out = width * self.expansion
        residual = nn.Sequential(
            nn.Conv2d(width_in, width, kernel_size=1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width_out, kernel_size=1, bias=False),
            norm(width_out),
        )
        super().__init__(residual, width_in, width_out, stride, norm)


class ViT(Encoder):
    """Vision transformer: pre-norm layers over patches with learned positions; the mean over patches is the feature.

    Source:
        Dosovitskiy et al., arXiv 2010.11929; mean pooling instead of a class token: Beyer et al., arXiv 2205.01580.
    """

    def __init__(self, config: ViTConfig, spec: ImageSpec) -> None:
        super().__init__()
        if spec.height % config.patch_size or spec.width % config.patch_size:
            raise UserError(
                f"patch_size ({config.patch_size}) must divide the size of the images, {spec.height}x{spec.width}"
            )
        patches = (spec.height // config.patch_size) * (spec.width // config.patch_size)
        self.patches = nn.Conv2d(spec.channels, config.width, config.patch_size, stride=config.patch_size)
        self.positions = nn.Parameter(torch.randn(patches, config.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            dim_feedforward=4 * config.width,
            dropout=config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, config.depth, norm=nn.LayerNorm(config.width), enable_nested_tensor=False
        )
        self.output_width = config.width

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [N, C, H, W] into features [N, output_width]."""
        states = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.layers(states).mean(dim=1)


class SpectrogramCNN(Encoder):
    """Convolutional encoder of spectrograms.

    What a sound is depends on where it lies in frequency and little on where it lies in time: after the convolutions
    time is averaged away, while each frequency band keeps features of its own. Group norm, as in `ImageCNN`.
    """

    def __init__(self, config: SpectrogramCNNConfig, spec: ImageSpec) -> None:
        super().__init__()
        widths = [spec.channels, *(config.width * 2**stage for stage in range(config.depth))]
        smallest = 2**config.depth
        if spec.height < smallest or spec.width < smallest:
            raise UserError(
                f"depth ({config.depth}) halves a spectrogram of {spec.height}x{spec.width} more often than it can be"
            )
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(width_in, width_out, kernel_size=3, padding=1),
                    nn.GroupNorm(math.gcd(_GROUPS, width_out), width_out),
                    nn.GELU(),
                    nn.MaxPool2d(kernel_size=2),
                )
                for width_in, width_out in itertools.pairwise(widths)
            )
        )
        self.output_width = widths[-1] * (spec.height // smallest)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, spectrograms: Tensor) -> Tensor:
        """Encode spectrograms [N, C, bands, frames] into features [N, output_width]."""
        return self.stages(spectrograms).mean(dim=3).flatten(1)
