"""Convolutional networks: their sizes against published ones, shapes, bounds, and that each learns a small batch."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modula_agd import (
    VGG16,
    BatchNorm,
    CrossEntropy,
    Features,
    GroupNorm,
    Image,
    InvalidArgument,
    Linear,
    Logits,
    ModulaError,
    Module,
    ReLU,
    ResCNN,
    ResNet,
    ResNet8,
    ResNet18,
    ResNet50,
    SpaceMismatch,
    agd,
)
from support import gaussian, trained

F64 = {"dtype": torch.float64}


def count(network: Module) -> int:
    return sum(math.prod(atom.shape) for atom in network.weights().values())


def normalisations(network: Module) -> int:
    """Channels that pass through a normalisation, over the whole network."""
    if isinstance(network, BatchNorm | GroupNorm):
        return network.on.width if network.on is not None else 0
    return sum(normalisations(child) for _, child in network.children)


# -- sizes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "published"),
    [
        # torchvision's models less their batch norms (9,600; 53,120) and the biases of their heads
        (ResNet18(1000, stem="imagenet"), 11_689_512 - 9_600 - 1000),
        (ResNet50(1000, stem="imagenet"), 25_557_032 - 53_120 - 1000),
        # its VGG-16 has 14,714,688 in convolutions with biases, of which 4,224 are biases
        (VGG16(10), 14_714_688 - 4_224 + 512 * 10),
        (VGG16(10, bias=True), 14_714_688 + 512 * 10 + 10),
    ],
    ids=["ResNet18", "ResNet50", "VGG16", "VGG16 with biases"],
)
def test_networks_of_usual_size_have_the_published_number_of_weights(network: Module, published: int) -> None:
    assert count(network) == published


def residual_weights(
    width: int, blocks: tuple[int, ...], channels: int, outputs: int, bottleneck: bool
) -> tuple[int, int]:
    """Weights, and biases if there are any, of a ResNet with a 3×3 stem; counted layer by layer."""
    expansion, inside, weights, biases = 4 if bottleneck else 1, width, 9 * channels * width, width
    for stage, repeats in enumerate(blocks):
        inner = width * 2**stage
        outside = expansion * inner
        for repeat in range(repeats):
            if bottleneck:
                weights += inside * inner + 9 * inner**2 + inner * outside
                biases += 2 * inner + outside
            else:
                weights += 9 * inside * inner + 9 * inner * outside
                biases += inner + outside
            if inside != outside or (stage > 0 and repeat == 0):
                weights += inside * outside
                biases += outside
            inside = outside
    return weights + inside * outputs, biases + outputs


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("form", ["convex", "sum"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("bias", "affine"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_resnet_has_the_weights_that_its_layers_have(
    bottleneck: bool, form: Any, norm: Any, bias: bool, affine: bool
) -> None:
    blocks = (1, 2, 1)
    net = ResNet(5, 2, width=4, blocks=blocks, bottleneck=bottleneck, form=form, norm=norm, bias=bias, affine=affine)
    weights, biases = residual_weights(4, blocks, 2, 5, bottleneck)
    scales = 2 * normalisations(net) if affine else 0
    assert count(net) == weights + bias * biases + scales
    assert (normalisations(net) > 0) == (norm != "none")
    assert (net.domain, net.codomain) == (Image(2), Features(5))
    params = net.init(0)
    assert {name: tuple(value.shape) for name, value in params.items()} == {
        name: atom.shape for name, atom in net.weights().items()
    }
    out, buffers = net.run(params, gaussian(2, 2, 8, 8, dtype=torch.float32))
    assert out.shape == (2, 5)
    assert len(buffers) == (2 * 9 if norm == "batch" else 0) + (4 * 2 if norm == "batch" and bottleneck else 0)
    assert bool(out.isfinite().all())


def test_affine_parameters_follow_each_normalisation() -> None:
    plain, affine = (ResNet8(Logits(3), width=4, affine=choice) for choice in (False, True))
    assert count(affine) == count(plain) + 2 * normalisations(plain)
    assert sum("scale" in name for name in affine.weights()) == 7


# -- the map ---------------------------------------------------------------------------------------------------------------


def test_a_small_resnet_is_what_its_description_says() -> None:
    net = ResNet(5, 2, width=4, blocks=(1, 1), norm="none")
    p, x = list(net.init(0, **F64).values()), gaussian(3, 2, 8, 8)

    def act(y: Tensor) -> Tensor:
        return math.sqrt(2) * y.relu()

    def conv(y: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
        return functional.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2)

    h = conv(x, p[0])
    h = h / 2 + conv(act(conv(act(h), p[1])), p[2]) / 2
    y = act(h)
    h = conv(y, p[3], 2) / 2 + conv(act(conv(y, p[4], 2)), p[5]) / 2
    torch.testing.assert_close(net(dict(zip(net.init(0), p, strict=True)), x), act(h).mean((2, 3)) @ p[6].mT)


def test_the_sum_form_adds_what_the_convex_form_averages() -> None:
    convex, total = (ResNet(5, 2, width=4, blocks=(1,), norm="none", form=form) for form in ("convex", "sum"))
    params, x = total.init(0, **F64), gaussian(3, 2, 8, 8)
    # one block alone is convex without a shortcut
    assert len(convex.weights()) == len(params) == 4
    p = list(params.values())
    h = functional.conv2d(x, p[0], padding=1)
    inner = functional.conv2d(math.sqrt(2) * h.relu(), p[1], padding=1)
    h = h + functional.conv2d(math.sqrt(2) * inner.relu(), p[2], padding=1)
    torch.testing.assert_close(total(params, x), math.sqrt(2) * h.relu().mean((2, 3)) @ p[3].mT)


@pytest.mark.parametrize(("stem", "side"), [("cifar", 8), ("imagenet", 32)])
def test_stems_and_stages_divide_the_image(stem: Any, side: int) -> None:
    net = ResNet(Logits(3), 3, width=2, blocks=(1, 1), stem=stem, norm="none")
    params, x = net.init(0), gaussian(2, 3, side, side, dtype=torch.float32)
    assert net(params, x).shape == (2, 3)
    # any size that survives the strides will do, odd ones included
    assert net(params, gaussian(2, 3, side + 1, side + 3, dtype=torch.float32)).shape == (2, 3)


def test_the_batch_norm_of_a_network_is_the_one_of_torch() -> None:
    net = ResNet(3, 2, width=4, blocks=(1,), form="sum")
    params, x = net.init(0, **F64), gaussian(3, 2, 4, 4)
    p, norms = list(params.values()), [nn.BatchNorm2d(4, affine=False, **F64) for _ in range(3)]
    h = functional.conv2d(x, p[0], padding=1)
    inner = functional.conv2d(math.sqrt(2) * norms[0](h).relu(), p[1], padding=1)
    h = h + functional.conv2d(math.sqrt(2) * norms[1](inner).relu(), p[2], padding=1)
    expected = math.sqrt(2) * norms[2](h).relu().mean((2, 3)) @ p[3].mT
    out, buffers = net.run(params, x)
    torch.testing.assert_close(out, expected)
    theirs = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    for ours, value in zip(buffers.values(), theirs, strict=True):
        torch.testing.assert_close(ours, value)


# -- bounds ----------------------------------------------------------------------------------------------------------------


def test_vgg_is_a_chain_of_fourteen_atoms() -> None:
    for norm in ("batch", "group", "none"):
        bound = VGG16(Logits(3), width=1, norm=norm).bound()
        assert bound.depth == bound.ceiling == pytest.approx(14)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_the_depth_of_a_convex_resnet_tends_to_a_limit_in_its_blocks(norm: Any) -> None:
    # a stem, a head, one block of two, and the 1×1 convolution and block that change the shape
    depths = [ResNet(3, width=2, blocks=(b, b), norm=norm).bound().depth for b in (1, 2, 4, 8, 32)]
    assert all(later - earlier <= (earlier - 4) / 2 for earlier, later in pairwise(depths))
    assert depths[-1] < 5
    ceilings = [ResNet(3, width=2, blocks=(b, b), norm=norm).bound().ceiling for b in (1, 2, 4, 8, 32)]
    assert ceilings == pytest.approx([2 + 2 * 2 * b for b in (1, 2, 4, 8, 32)])


def test_the_depth_of_the_sum_form_grows_with_its_blocks() -> None:
    depths = [ResNet(3, width=2, blocks=(b, b), norm="none", form="sum").bound().depth for b in (1, 2, 4, 8)]
    assert all(later > 1.3 * earlier for earlier, later in pairwise(depths))


@pytest.mark.parametrize("blocks", [1, 2, 8, 32])
def test_the_depth_of_a_residual_cnn_is_that_of_one_block(blocks: int) -> None:
    net = ResCNN(Logits(3), 4, blocks=blocks)
    assert net.bound().depth == pytest.approx(2 + 2)
    assert net.bound().magnitude == pytest.approx(1)
    assert net.bound().ceiling == pytest.approx(2 + 2 * blocks)
    assert count(net) == 9 * 3 * 4 + 2 * blocks * 9 * 16 + 4 * 3
    assert count(ResCNN(Logits(3), 4, blocks=blocks, bias=True)) == count(net) + 4 + 2 * blocks * 4 + 3
    assert count(ResCNN(Logits(3), 4, blocks=blocks, block_depth=3)) == 9 * 3 * 4 + 3 * blocks * 9 * 16 + 4 * 3


NETWORKS: dict[str, tuple[Callable[[], Module], int]] = {
    "VGG16": (lambda: VGG16(Logits(3), width=1), 32),
    "VGG16, all options": (lambda: VGG16(Logits(3), width=2, norm="group", bias=True, affine=True), 32),
    "ResNet8": (lambda: ResNet8(Logits(3), width=4), 8),
    "ResNet8, sum": (lambda: ResNet8(Logits(3), width=4, form="sum", bias=True, affine=True), 8),
    "ResNet8, group": (lambda: ResNet8(Logits(3), width=4, norm="group"), 8),
    "ResNet8, none": (lambda: ResNet8(Logits(3), width=4, norm="none", bias=True), 8),
    "bottlenecks": (lambda: ResNet(Logits(3), width=2, blocks=(1, 1), bottleneck=True), 8),
    "imagenet": (lambda: ResNet(Logits(3), width=2, blocks=(1, 1), stem="imagenet", affine=True), 24),
    "ResCNN": (lambda: ResCNN(Logits(3), 4), 8),
    "ResCNN with biases": (lambda: ResCNN(Logits(3), 4, blocks=2, block_depth=1, bias=True), 8),
}
each_network = pytest.mark.parametrize("name", list(NETWORKS))


@each_network
@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.95}], ids=["full batch", "momentum"])
def test_each_learns_a_small_batch(name: str, options: dict[str, Any]) -> None:
    build, side = NETWORKS[name]
    x = gaussian(6, 3, side, side)
    # momentum's first steps are short: fourteen layers with biases take longer to tell from none
    steps = 60 if options["momentum"] and "VGG16" in name else 30
    before, after = trained(build(), CrossEntropy(), x, torch.arange(6) % 3, steps=steps, **options)
    assert after < (0.99 if options["momentum"] else 0.95) * before


@each_network
def test_each_has_a_finite_ceiling_a_certificate_and_a_table(name: str) -> None:
    net = NETWORKS[name][0]()
    bound = net.bound()
    assert 0 < bound.depth <= bound.ceiling < math.inf
    certificate = agd(net, CrossEntropy()).certificate()
    assert any("Norm" in text for text in certificate.assumptions) == (normalisations(net) > 0)
    assert "ceiling depth" in str(net)


# -- what they refuse ------------------------------------------------------------------------------------------------------

WRONG = [0, -1, 2.5, True, None, "2", float("nan"), (2,)]


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_are_positive_integers(wrong: Any) -> None:
    for build in (
        lambda: VGG16(wrong),
        lambda: VGG16(3, wrong),
        lambda: VGG16(3, width=wrong),
        lambda: ResNet(wrong, width=2, blocks=(1,)),
        lambda: ResNet(3, wrong, width=2, blocks=(1,)),
        lambda: ResNet(3, width=wrong, blocks=(1,)),
        lambda: ResNet(3, width=2, blocks=(1, wrong)),
        lambda: ResNet8(3, width=2, depth=wrong),
        lambda: ResCNN(3, wrong),
        lambda: ResCNN(3, 4, wrong),
        lambda: ResCNN(3, 4, blocks=wrong),
        lambda: ResCNN(3, 4, block_depth=wrong),
    ):
        with pytest.raises(ModulaError):
            build()


@pytest.mark.parametrize("blocks", [0, 2, None, (), "22", {1, 2}])
def test_blocks_are_a_number_for_each_stage(blocks: Any) -> None:
    with pytest.raises(InvalidArgument, match="for each stage"):
        ResNet(3, width=2, blocks=blocks)


@pytest.mark.parametrize("wrong", ["batchnorm", None, True, 1, BatchNorm()])
def test_choices_are_named(wrong: Any) -> None:
    for build, choice in (
        (lambda: ResNet(3, width=2, norm=wrong), "'batch', 'group' or 'none'"),
        (lambda: VGG16(3, width=1, norm=wrong), "'batch', 'group' or 'none'"),
        (lambda: ResNet(3, width=2, form=wrong), "'convex' or 'sum'"),
        (lambda: ResNet(3, width=2, stem=wrong), "'cifar' or 'imagenet'"),
    ):
        with pytest.raises(InvalidArgument, match=choice):
            build()


@pytest.mark.parametrize("wrong", ["none", None, 1, 0.0])
def test_yes_or_no_is_true_or_false(wrong: Any) -> None:
    for option in ("bias", "affine", "bottleneck"):
        with pytest.raises(InvalidArgument, match="True or False"):
            ResNet(3, width=2, blocks=(1,), **{option: wrong})
    with pytest.raises(InvalidArgument, match="True or False"):
        ResCNN(3, 4, bias=wrong)


@pytest.mark.parametrize(
    ("network", "x"),
    [
        (ResNet8(3, width=2), torch.ones(2, 1, 8, 8)),
        (ResNet8(3, width=2), torch.ones(2, 8, 8, 3)),
        (ResNet8(3, width=2), torch.ones(2, 3 * 8 * 8)),
        (ResNet8(3, width=2), torch.ones(2, 3, 8, 8, dtype=torch.uint8)),
        (VGG16(3, width=1, norm="none"), torch.ones(2, 3, 16, 16)),
        (ResCNN(3, 4), torch.ones(2, 3, 1, 1)),
    ],
    ids=["grey", "channels last", "flat", "integers", "too small for five poolings", "too small for one"],
)
def test_images_that_do_not_fit_are_refused(network: Module, x: Tensor) -> None:
    with pytest.raises(SpaceMismatch):
        network.run(network.init(0), x)


def test_heads_are_of_features_or_logits() -> None:
    with pytest.raises(SpaceMismatch):
        ResNet8(Image(3), width=2)
    assert ResNet8(Logits(3), width=2).codomain == Logits(3)
    assert (Linear(2, 3) @ ReLU() @ ResNet8(3, width=2)).codomain == Features(2)
