"""Architectures by name: each takes its data, has its own options, and refuses the rest."""

import pytest
import torch

from modula_agd import Conv2d, Features, InvalidArgument, Logits
from modula_agd.train import ARCHITECTURES, ImageFacts, TextFacts, Vocabulary, build
from modula_agd.train.architecture import settled

TEXT = TextFacts("verse", Vocabulary("abcdefg"), 12)
SMALL = {"width": 8, "depth": 1, "heads": 2}


def images(side: int = 32, channels: int = 3, width: int | None = None) -> ImageFacts:
    return ImageFacts("pictures", 5, (channels, side, width or side), (0.0,) * channels, (1.0,) * channels)


def small(name: str, **more: object) -> dict[str, object]:
    return {option: value for option, value in SMALL.items() if option in ARCHITECTURES[name].options} | more


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_maps_its_data_to_a_score_per_class(name):
    takes = ARCHITECTURES[name].takes
    facts = TEXT if takes == "text" else images()
    network = build(name, facts, **small(name))
    params, buffers = network.init(0), network.buffers()
    generator = torch.Generator().manual_seed(0)
    if takes == "text":
        outputs = network(params, torch.randint(7, (2, 12), generator=generator), buffers)
        assert outputs.shape == (2, 12, 7)
    else:
        batch = torch.randn((2, 3, 32, 32), generator=generator)
        outputs = network(params, batch.flatten(1) if takes == "rows" else batch, buffers)
        assert outputs.shape == (2, 5)
    assert outputs.isfinite().all()
    assert network.codomain == Logits(facts.classes)


@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.kind == "images"])
def test_outputs_may_be_features_too(name):
    assert build(name, images(), logits=False, **small(name)).codomain == Features(5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_option_that_it_has_changes_the_network(name):
    facts = TEXT if ARCHITECTURES[name].takes == "text" else images()
    other = {"depth": 2, "width": 16, "heads": 4, "bias": True, "affine": True, "form": "sum", "dropout": 0.5}
    # a convex stack of one block of one kind is its block, as is its sum, so two blocks are compared
    base = small(name, **({"depth": 2} if "depth" in ARCHITECTURES[name].options else {}))
    for option in ARCHITECTURES[name].options:
        value = 1 if option == "depth" else other[option]
        assert build(name, facts, **base) != build(name, facts, **{**base, option: value}), option


def test_depth_one_is_one_linear_layer():
    assert [tuple(value.shape) for value in build("linear", images(4), depth=1).init(0).values()] == [(5, 48)]


def test_large_images_get_a_coarse_stem_and_large_patches():
    def first(name: str, side: int) -> Conv2d:
        return next(atom for _, atom in build(name, images(side), **small(name)).atoms() if isinstance(atom, Conv2d))

    assert [first("resnet18", side).stride for side in (32, 224)] == [1, 2]
    assert [first("resnet50", side).shape[-1] for side in (32, 224)] == [3, 7]
    assert [first("vit", side).shape[-1] for side in (32, 224)] == [4, 16]


@pytest.mark.parametrize(
    ("name", "facts", "options", "said"),
    [
        ("mlp", images(), {}, "there is no architecture 'mlp'; choose one of fcn, "),
        ("gpt", images(), {}, "takes text, but the images of pictures is images. Choose fcn or "),
        ("fcn", TEXT, {}, "takes images, but the text of verse is text. Choose gpt for it"),
        (
            "fcn",
            images(),
            {"heads": 2},
            "option heads was given for the architecture fcn, but is an option of gpt, vit",
        ),
        ("vgg16", images(), {"depth": 2}, "is an option of fcn, "),
        ("resnet18", images(), {"patch": 2}, "is an option of none; resnet18 has width"),
        ("vgg16", images(28), {}, "needs images of at least 32×32 pixels, but those of pictures have 28×28"),
        ("vit", images(30), {}, "patches of 4×4 pixels, but those of pictures have 30×30"),
        ("vit", images(32, width=40), {}, "square images"),
        ("gpt", TEXT, {"width": 9, "heads": 2}, "must divide the width 9"),
        ("fcn", images(), {"depth": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(name, facts, options, said):
    with pytest.raises(InvalidArgument) as raised:
        build(name, facts, **options)
    assert said in str(raised.value)


def test_options_that_are_left_out_have_the_architectures_default():
    assert settled("fcn", {"depth": 8}) == {"depth": 8, "width": 128, "bias": False}
