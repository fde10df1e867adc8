"""The networks that ``--arch`` names: what each takes, which options it has, and how it is built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modula_agd import (
    GPT,
    MLP,
    VGG16,
    Linear,
    Logits,
    Module,
    ResCNN,
    ResMLP,
    ResNet8,
    ResNet18,
    ResNet50,
    Space,
    ViT,
)
from modula_agd.error import InvalidArgument
from modula_agd.train.facts import Facts, ImageFacts, TextFacts

Takes = Literal["rows", "images", "text"]
Options = Mapping[str, Any]

LARGE = 128
"""Pixels from which an image is treated as a photograph rather than a thumbnail: a coarser stem, larger patches."""


@dataclass(frozen=True)
class Architecture:
    """A family of networks.

    Args:
        about: what it is, and what its depth counts, as a phrase.
        takes: rows of features (from images), images, or text.
        options: each option that it has, with its default.
        make: the network for its outputs, the data's facts and a value of every option.
        least: pixels that each side of an image must have at least.
    """

    about: str
    takes: Takes
    options: Options
    make: Callable[[int | Space, Any, Options], Module]
    least: int = 1

    @property
    def kind(self) -> str:
        """The kind of data that it fits: "images" or "text"."""
        return "text" if self.takes == "text" else "images"


def fitting(name: str, kind: str, data: str) -> Architecture:
    """The architecture of that name, if it fits the kind of data.

    Args:
        name: a key of ``ARCHITECTURES``.
        kind: "images" or "text".
        data: what a message calls the data.

    Raises:
        InvalidArgument: the name is unknown, or the architecture takes other data.
    """
    if name not in ARCHITECTURES:
        raise InvalidArgument(f"there is no architecture {name!r}; choose one of {', '.join(ARCHITECTURES)}")
    found = ARCHITECTURES[name]
    if found.kind != kind:
        others = [other for other, architecture in ARCHITECTURES.items() if architecture.kind == kind]
        raise InvalidArgument(
            f"the architecture {name} takes {found.kind}, but {data} is {kind}. Choose {' or '.join(others)} for it, or give "
            f"{name} a data set of {found.kind}."
        )
    return found


def settled(name: str, given: Options) -> dict[str, Any]:
    """Every option of an architecture: as given, or its default.

    Args:
        name: a key of ``ARCHITECTURES``.
        given: options by name.

    Raises:
        InvalidArgument: the architecture has no such option.
    """
    own = ARCHITECTURES[name].options
    for option in given:
        if option not in own:
            others = [other for other, architecture in ARCHITECTURES.items() if option in architecture.options]
            belongs = f"is an option of {', '.join(others)}" if others else "is an option of none"
            raise InvalidArgument(
                f"the option {option} was given for the architecture {name}, but {belongs}; {name} has {', '.join(own)}. Leave it out."
            )
    return {option: given.get(option, default) for option, default in own.items()}


def build(name: str, facts: Facts, *, logits: bool = True, **options: Any) -> Module:
    """A network for some data.

    Args:
        name: a key of ``ARCHITECTURES``.
        facts: what the data are.
        logits: whether outputs are measured by their maximum (``Logits``), for which cross-entropy's bound is proved, or by
            their root mean square (``Features``). Text always has ``Logits``.
        options: those of the architecture; its own defaults where left out.

    Raises:
        InvalidArgument: the name or an option is unknown or out of range, or the architecture does not fit the data.
    """
    found = fitting(name, "images" if isinstance(facts, ImageFacts) else "text", str(facts))
    if isinstance(facts, ImageFacts) and min(facts.shape[1:]) < found.least:
        raise InvalidArgument(
            f"the architecture {name} needs images of at least {found.least}×{found.least} pixels, but those of {facts.name} "
            f"have {facts.shape[1]}×{facts.shape[2]}. Choose another, or larger images."
        )
    outputs = Logits(facts.classes) if logits else facts.classes
    return found.make(outputs, facts, settled(name, options))


def _linear(outputs: int | Space, facts: ImageFacts, options: Options) -> Module:
    width, depth = options["width"], options["depth"]
    if depth == 1:
        return Linear(outputs, facts.features)
    network: Module = Linear(width, facts.features)
    for _ in range(depth - 2):
        network = Linear(width, width) @ network
    return Linear(outputs, width) @ network


def _stem(facts: ImageFacts) -> Literal["cifar", "imagenet"]:
    return "imagenet" if min(facts.shape[1:]) >= LARGE else "cifar"


def _vit(outputs: int | Space, facts: ImageFacts, o: Options) -> Module:
    channels, height, width = facts.shape
    # Patches of 16 pixels: Dosovitskiy et al. 2021 (arXiv:2010.11929); of 4 they make as many tokens of a 32×32 image as
    # fit into a small run.
    patch = 16 if height >= LARGE else 4
    if height != width or height % patch:
        raise InvalidArgument(
            f"the architecture vit cuts square images into patches of {patch}×{patch} pixels, but those of {facts.name} have "
            f"{height}×{width}. Choose another architecture, or resize the images."
        )
    return ViT(outputs, o["width"], o["heads"], o["depth"], channels, patch, height, **_rest(o))


def _gpt(outputs: int | Space, facts: TextFacts, o: Options) -> Module:
    return GPT(facts.classes, o["width"], o["heads"], o["depth"], facts.context, **_rest(o))


def _rest(o: Options) -> dict[str, Any]:
    """The options that a transformer takes by name."""
    return {name: value for name, value in o.items() if name not in ("width", "heads", "depth")}


_PLAIN = {"bias": False, "affine": False}
_RESIDUAL = {"form": "convex", **_PLAIN}

ARCHITECTURES: dict[str, Architecture] = {
    "fcn": Architecture(
        "depth Linear layers with rectifiers between",
        "rows",
        {"depth": 3, "width": 128, "bias": False},
        lambda out, data, o: MLP(out, o["width"], data.features, o["depth"], bias=o["bias"]),
    ),
    "resmlp": Architecture(
        "depth residual blocks of two layers between two Linear layers",
        "rows",
        {"depth": 3, "width": 128, "bias": False},
        lambda out, data, o: ResMLP(out, o["width"], data.features, o["depth"], bias=o["bias"]),
    ),
    "linear": Architecture(
        "depth Linear layers and nothing else",
        "rows",
        {"depth": 3, "width": 128},
        _linear,
    ),
    "cnn": Architecture(
        "a small ResNet, depth blocks in each of three stages",
        "images",
        {"depth": 1, "width": 16, **_RESIDUAL},
        lambda out, data, o: ResNet8(out, data.shape[0], **o),
    ),
    "vgg16": Architecture(
        "VGG-16",
        "images",
        {"width": 64, **_PLAIN},
        lambda out, data, o: VGG16(out, data.shape[0], **o),
        least=32,
    ),
    "resnet18": Architecture(
        "ResNet-18",
        "images",
        {"width": 64, **_RESIDUAL},
        lambda out, data, o: ResNet18(out, data.shape[0], stem=_stem(data), **o),
    ),
    "resnet50": Architecture(
        "ResNet-50",
        "images",
        {"width": 64, **_RESIDUAL},
        lambda out, data, o: ResNet50(out, data.shape[0], stem=_stem(data), **o),
    ),
    "rescnn": Architecture(
        "depth convolutional residual blocks without normalisation",
        "images",
        {"depth": 4, "width": 64, "bias": False},
        lambda out, data, o: ResCNN(out, o["width"], data.shape[0], o["depth"], bias=o["bias"]),
        least=2,
    ),
    "gpt": Architecture(
        "a transformer of depth blocks that predicts the next character",
        "text",
        {"depth": 4, "width": 128, "heads": 4, **_RESIDUAL, "dropout": 0.0},
        _gpt,
    ),
    "vit": Architecture(
        "a vision transformer of depth blocks",
        "images",
        {"depth": 6, "width": 192, "heads": 3, **_RESIDUAL},
        _vit,
        least=4,
    ),
}
