"""Convolutional networks: VGG, pre-activation ResNets, and a residual network without normalisation.

All take an Image and start from weights of declared norm. Convolutions have no bias and normalisation no affine parameters
unless asked for, as in the AGD paper's experiments. Kernels before a normalisation are measured as one matrix, geometry "patch": its
smaller initial weights are divided out there (but for the last kernel of a block, whose branch starts smaller beside its
shortcut), and it trains better than the "taps" of the AGD code (docs/trials.md). Without a normalisation they are measured tap
by tap, as white noise would lose two thirds in each layer otherwise.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

from modula_agd.atom import Bias
from modula_agd.bond import Identity, Mean
from modula_agd.compound import Form, linear, mixed, normalised, rectifier, residual
from modula_agd.convolution import Conv2d
from modula_agd.error import InvalidArgument
from modula_agd.module import Module
from modula_agd.normalisation import BatchNorm, GroupNorm
from modula_agd.pooling import AvgPool2d, MaxPool2d
from modula_agd.space import Image, Space, flag, positive

Normalisation = Literal["batch", "group", "none"]


@dataclass(frozen=True)
class _Style:
    """What every layer of one network has in common."""

    norm: Normalisation
    bias: bool
    affine: bool

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "group", "none"):
            raise InvalidArgument(f"a network was asked for with norm={self.norm!r}; choose 'batch', 'group' or 'none'")
        flag("the choice of a bias", self.bias)
        flag("the choice of affine parameters", self.affine)

    def conv(self, fan_out: int, fan_in: int, kernel: int = 3, stride: int = 1) -> Module:
        """A convolution that keeps the size of the image, or divides it by the stride."""
        geometry = "taps" if self.norm == "none" else "patch"
        layer = Conv2d(fan_out, fan_in, kernel, stride=stride, padding=kernel // 2, geometry=geometry)
        return Bias(Image(fan_out)) @ layer if self.bias else layer

    def activation(self, channels: int) -> Module:
        """Normalisation, if any, and rectifier."""
        if self.norm == "none":
            return rectifier().bind(Image(channels))
        layer = BatchNorm() if self.norm == "batch" else GroupNorm()
        return rectifier() @ normalised(layer, Image(channels), self.affine)


def _chain(*layers: Module) -> Module:
    """Layers in order of application, which long networks are easier to read in."""
    network, *rest = layers
    for layer in rest:
        network = layer @ network
    return network


def VGG16(
    outputs: int | Space,
    channels: int = 3,
    *,
    width: int = 64,
    norm: Normalisation = "batch",
    bias: bool = False,
    affine: bool = False,
) -> Module:
    """VGG-16 for images of 32×32 (Simonyan & Zisserman 2015, arXiv:1409.1556): 13 convolutions, five max-poolings, a head.

    Args:
        outputs: number of outputs, or a space such as ``Logits(100)``.
        channels: of the images.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        norm: normalisation after each convolution.
        bias: whether convolutions and head have a bias.
        affine: whether normalisation is followed by a scale and a bias.

    Raises:
        InvalidArgument: a number is below 1, or a choice is none of those named.
    """
    positive("the width of a VGG16", width)
    style, layers, fan_in = _Style(norm, bias, affine), [], channels
    for times, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(convolutions):
            layers += [style.conv(times * width, fan_in), style.activation(times * width)]
            fan_in = times * width
        layers.append(MaxPool2d(2))
    return _chain(*layers, Mean(), linear(outputs, fan_in, bias))


def ResNet(
    outputs: int | Space,
    channels: int = 3,
    *,
    width: int = 64,
    blocks: SequenceOf[int] = (2, 2, 2, 2),
    bottleneck: bool = False,
    stem: Literal["cifar", "imagenet"] = "cifar",
    form: Form = "convex",
    norm: Normalisation = "batch",
    bias: bool = False,
    affine: bool = False,
) -> Module:
    """A pre-activation residual network (He et al. 2016, arXiv:1603.05027); each stage halves the image and doubles the width.

    Args:
        outputs: number of outputs, or a space.
        channels: of the images.
        width: channels of the first stage.
        blocks: residual blocks of each stage.
        bottleneck: blocks of 1×1, 3×3 and 1×1 convolutions with four times as many channels outside, instead of two 3×3.
        stem: "cifar", one 3×3 convolution; "imagenet", 7×7 of stride 2 and a max-pooling of stride 2.
        form: "convex" residual connections, (1 − 1/B)·shortcut + (1/B)·block with B blocks in all, or their "sum".
        norm: normalisation before each rectifier.
        bias: whether convolutions and head have a bias.
        affine: whether normalisation is followed by a scale and a bias.

    Raises:
        InvalidArgument: the width or a number of blocks is below 1, or a choice is none of those named.
    """
    positive("the width of a ResNet", width)
    if stem not in ("cifar", "imagenet"):
        raise InvalidArgument(f"a ResNet was asked for with stem={stem!r}; choose 'cifar' or 'imagenet'")
    if not isinstance(blocks, tuple | list) or not blocks:
        raise InvalidArgument(f"a ResNet was asked for with blocks={blocks!r}; give a number of blocks for each stage")
    for repeats in blocks:
        positive("the number of blocks of a stage", repeats)
    flag("the choice of bottlenecks", bottleneck)
    style, count, expansion = _Style(norm, bias, affine), sum(blocks), 4 if bottleneck else 1
    if stem == "cifar":
        layers = [style.conv(width, channels)]
    else:
        layers = [style.conv(width, channels, 7, 2), style.activation(width), MaxPool2d(3, stride=2, padding=1)]
    fan_in = width
    for stage, repeats in enumerate(blocks):
        inner = width * 2**stage
        for repeat in range(repeats):
            stride = 2 if stage > 0 and repeat == 0 else 1
            layers.append(_block(style, expansion * inner, inner, fan_in, stride, bottleneck, count, form))
            fan_in = expansion * inner
    return _chain(*layers, style.activation(fan_in), Mean(), linear(outputs, fan_in, bias))


def _block(
    style: _Style, fan_out: int, inner: int, fan_in: int, stride: int, bottleneck: bool, count: int, form: Form
) -> Module:
    """One residual block; where the shape changes, the shortcut is a 1×1 convolution of the activated input."""
    if bottleneck:
        branch = _chain(
            style.conv(inner, fan_in, 1),
            style.activation(inner),
            style.conv(inner, inner, 3, stride),
            style.activation(inner),
            style.conv(fan_out, inner, 1),
        )
    else:
        branch = _chain(style.conv(inner, fan_in, 3, stride), style.activation(inner), style.conv(fan_out, inner))
    if fan_in == fan_out and stride == 1:
        return mixed(Identity(), branch @ style.activation(fan_in), count, form)
    return mixed(style.conv(fan_out, fan_in, 1, stride), branch, count, form) @ style.activation(fan_in)


def ResNet8(outputs: int | Space, channels: int = 3, *, width: int = 16, depth: int = 1, **options: object) -> Module:
    """A small ResNet for a CPU: a stem and three stages of ``depth`` blocks with 16, 32 and 64 channels, and a head.

    Args:
        outputs: number of outputs, or a space.
        channels: of the images.
        width: channels of the first stage.
        depth: blocks of each stage; 1 makes seven 3×3 convolutions.
        options: as for ``ResNet``.

    Raises:
        InvalidArgument: a number is below 1.
    """
    positive("the depth of a ResNet8", depth)
    return ResNet(outputs, channels, width=width, blocks=(depth,) * 3, **options)  # pyright: ignore[reportArgumentType]


def ResNet18(outputs: int | Space, channels: int = 3, *, width: int = 64, **options: object) -> Module:
    """Pre-activation ResNet-18; arguments as for ``ResNet``."""
    return ResNet(outputs, channels, width=width, blocks=(2, 2, 2, 2), **options)  # pyright: ignore[reportArgumentType]


def ResNet50(outputs: int | Space, channels: int = 3, *, width: int = 64, **options: object) -> Module:
    """Pre-activation ResNet-50, with ``stem="imagenet"`` for images of 224×224; arguments as for ``ResNet``."""
    return ResNet(outputs, channels, width=width, blocks=(3, 4, 6, 3), bottleneck=True, **options)  # pyright: ignore


def ResCNN(
    outputs: int | Space,
    width: int,
    channels: int = 3,
    blocks: int = 4,
    *,
    block_depth: int = 2,
    bias: bool = False,
) -> Module:
    """A convex residual stack of convolutions at half the image's size, without normalisation.

    Args:
        outputs: number of outputs, or a space.
        width: channels of the residual stream.
        channels: of the images.
        blocks: number of residual blocks.
        block_depth: layers of rectifier and convolution per block.
        bias: whether convolutions and head have a bias.

    Raises:
        InvalidArgument: a number is below 1.
    """
    positive("the width of a ResCNN", width)
    positive("the depth of a block", block_depth)
    style = _Style("none", bias, False)
    layer = style.conv(width, width) @ style.activation(width)
    return _chain(
        style.conv(width, channels),
        AvgPool2d(2),
        residual(layer**block_depth, blocks),
        style.activation(width),
        Mean(),
        linear(outputs, width, bias),
    )
