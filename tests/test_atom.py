"""Each atom against ``torch.nn``, its declared spaces and norm, and witnesses that attain its gain."""

import math

import pytest
import torch
from torch import Tensor, nn

from modula_agd import (
    RMS,
    Atom,
    Bias,
    Embedding,
    Features,
    Heads,
    Image,
    InvalidArgument,
    Linear,
    Logits,
    RowNorm,
    Scale,
    Sequence,
    Sign,
    Space,
    SpaceMismatch,
    Spectral,
    Tokens,
    Unembedding,
    Volume,
)
from support import gaussian, tolerance

ATOMS: dict[str, tuple[Atom, tuple[int, ...]]] = {
    "Linear": (Linear(3, 5), (7, 5)),
    "Linear 1×1": (Linear(1, 1), (7, 1)),
    "Linear on a sequence": (Linear(3, Sequence(5)), (2, 4, 5)),
    "Linear into logits": (Linear(Logits(3), 5), (7, 5)),
    "Linear into logits over time": (Linear(Logits(3), Sequence(5)), (2, 4, 5)),
    "Scale": (Scale(5), (7, 5)),
    "Scale on an image": (Scale(Image(5)), (2, 5, 3, 3)),
    "Scale on a volume": (Scale(Volume(5)), (2, 5, 2, 3, 3)),
    "Scale on a sequence": (Scale(Sequence(5)), (2, 3, 5)),
    "Scale on logits": (Scale(Logits(5)), (7, 5)),
}
each = pytest.mark.parametrize(("atom", "shape"), ATOMS.values(), ids=ATOMS)


def reference(atom: Atom, weight: Tensor, x: Tensor) -> Tensor:
    match atom:
        case Linear():
            module = nn.Linear(*reversed(weight.shape), bias=False)
        case _:
            channels = 1 if isinstance(atom.domain, Image | Volume) else x.ndim - 1
            return torch.stack([w * part for w, part in zip(weight, x.unbind(channels), strict=True)], channels)
    module.weight.data = weight
    return module(x).detach()


@each
def test_forward_is_that_of_torch(atom: Atom, shape: tuple[int, ...]) -> None:
    weight, x = gaussian(*atom.shape), gaussian(*shape, seed=1)
    out = atom({atom.parameter: weight}, x)
    assert torch.equal(out, reference(atom, weight, x))
    assert atom.codomain is not None
    assert atom.codomain.fits(out)


@each
def test_outputs_stay_within_the_proved_gain_times_the_norm(atom: Atom, shape: tuple[int, ...]) -> None:
    assert atom.domain is not None
    assert atom.codomain is not None
    for seed in range(20):
        weight, x = gaussian(*atom.shape, seed=seed), gaussian(*shape, seed=seed + 100)
        allowed = atom.gain.proved.value * atom.norm.size(weight) * atom.domain.norm(x)
        ratio = atom.codomain.norm(atom.forward(weight, x)) / allowed
        assert ratio.max().item() <= 1 + tolerance(torch.float64, weight.numel())


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        (Features(3), (4, 3)),
        (Sequence(3), (4, 2, 3)),
        (Logits(3), (4, 3)),
        (Image(3), (4, 3, 2, 2)),
        (Volume(3), (4, 3, 2, 2, 2)),
    ],
)
def test_a_bias_adds_one_number_per_feature_at_every_position(space: Space, shape: tuple[int, ...]) -> None:
    bias, x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), gaussian(*shape)
    channels = 1 if isinstance(space, Image | Volume) else -1
    difference = (Bias(space)({"bias": bias}, x) - x).movedim(channels, -1)
    assert torch.allclose(difference, bias.expand_as(difference))


def test_an_embedding_looks_up_rows() -> None:
    table, ids = gaussian(7, 4), torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(Embedding(4, 7)({"weight": table}, ids), nn.Embedding.from_pretrained(table)(ids))


@pytest.mark.parametrize("id_", [7, -1])
def test_a_token_outside_the_vocabulary_is_an_error(id_: int) -> None:
    net = Embedding(4, 7)
    with pytest.raises(InvalidArgument, match=r"Embedding\(4, 7\) was given a token id outside 0\.\.6"):
        net(net.init(0), torch.tensor([[id_]]))


@pytest.mark.parametrize(
    ("atom", "domain", "codomain", "shape", "norm"),
    [
        (Linear(3, 5), Features(5), Features(3), (3, 5), Spectral()),
        (Linear(3, Sequence(5)), Sequence(5), Sequence(3), (3, 5), Spectral()),
        (Linear(Logits(3), 5), Features(5), Logits(3), (3, 5), RowNorm(math.sqrt(5))),
        (Embedding(4, 7), Tokens(7), Sequence(4), (7, 4), RowNorm(0.5)),
        (Bias(3), Features(3), Features(3), (3,), RMS()),
        (Bias(Image(3)), Image(3), Image(3), (3,), RMS()),
        (Bias(Logits(3)), Logits(3), Logits(3), (3,), Sign()),
        (Scale(3), Features(3), Features(3), (3,), Sign()),
    ],
)
def test_spaces_shape_and_norm_follow_from_the_declaration(
    atom: Atom, domain: Space, codomain: Space, shape: tuple[int, ...], norm: object
) -> None:
    assert (atom.domain, atom.codomain, atom.shape, atom.norm) == (domain, codomain, shape, norm)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Linear(3, Image(4)), r"takes Features or Sequence, not Image\(4\)"),
        (lambda: Linear(3, Logits(4)), r"takes Features or Sequence, not Logits\(4\)"),
        (lambda: Linear(Sequence(3), 4), r"from Features\(4\) gives Features or Logits, not Sequence\(3\)"),
        (lambda: Linear(Features(3), Sequence(4)), r"gives a Sequence, Heads or Logits, not Features\(3\)"),
        (lambda: Bias(Tokens(4)), r"acts on Features, Sequence, Image, Volume, Heads or Logits, not on Tokens\(4\)"),
        (lambda: Scale(Tokens(4)), r"not on Tokens\(4\)"),
    ],
)
def test_an_atom_between_spaces_that_it_cannot_join_is_an_error(build: object, message: str) -> None:
    with pytest.raises(SpaceMismatch, match=message):
        build()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Linear(0, 3),
        lambda: Linear(3, 0),
        lambda: Embedding(0, 3),
        lambda: Embedding(3, 0),
        lambda: Bias(0),
    ],
)
def test_a_number_out_of_range_is_an_error(build: object) -> None:
    with pytest.raises(InvalidArgument):
        build()  # pyright: ignore[reportCallIssue]


def test_a_bias_starts_at_zero_and_keeps_its_declared_size_as_floor() -> None:
    bias = Bias(3, size=0.3)
    assert bias.init(0)["bias"].tolist() == [0, 0, 0]
    assert bias.floor == 0.3
    assert Bias(3).size == 0.1


def test_a_bias_adds_its_size_to_the_magnitude_and_the_mean_to_the_depth() -> None:
    bound = (Bias(3, size=0.5, mass=2.0) @ Linear(3, 4)).bound()
    assert bound.magnitude == 1.5
    assert bound.depth == pytest.approx((1 * 1 + 0.5 * 2) / 1.5)
    assert bound.ceiling == 2


def test_a_scale_starts_at_its_size() -> None:
    assert Scale(3, size=2.0).init(0)["scale"].tolist() == [2, 2, 2]


def test_an_embedding_forgets_the_growth_of_its_input() -> None:
    bound = (Linear(2, Sequence(4)) @ Embedding(4, 7, size=3.0)).bound(0.5)
    assert (bound.magnitude, bound.depth) == (3.0, 2.0)
    assert bound.growth == pytest.approx(1.5**2)


# -- heads, and a head that shares an embedding's table --------------------------------------------------------------------


def test_a_projection_into_heads_is_measured_head_by_head() -> None:
    layer, x = Linear(Heads(2, 3), Sequence(4)), gaussian(5, 7, 4)
    weight = layer.init(0, dtype=torch.float64)["weight"]
    out = layer({"weight": weight}, x)
    assert layer.codomain.fits(out)
    for head in range(2):
        part = weight[3 * head : 3 * head + 3]
        torch.testing.assert_close(out[:, head], x @ part.mT)
        assert math.sqrt(4 / 3) * float(torch.linalg.matrix_norm(part, 2)) == pytest.approx(1)
    # the leading input of one head attains the gain
    leading = torch.linalg.svd(weight[:3])[2][0]
    ratio = layer.codomain.norm(layer({"weight": weight}, leading[None, None])) / layer.domain.norm(leading[None, None])
    assert float(ratio) == pytest.approx(1)


def test_biases_and_scales_of_heads_have_a_row_for_each_head() -> None:
    x, weight = gaussian(5, 2, 7, 3), gaussian(2, 3)
    for layer, expected in ((Bias(Heads(2, 3)), x + weight[:, None]), (Scale(Heads(2, 3)), x * weight[:, None])):
        assert layer.shape == (2, 3)
        torch.testing.assert_close(layer({layer.parameter: weight}, x), expected)
    # a bias counts by its largest head, as the space does
    assert float(Bias(Heads(2, 3)).norm.size(weight)) == pytest.approx(float(Heads(2, 3).norm(weight[None, :, None])))


def test_an_unembedding_scores_by_rows_of_the_table_over_their_width() -> None:
    layer, x, weight = Unembedding(5, 4), gaussian(2, 3, 4), gaussian(5, 4, seed=1)
    torch.testing.assert_close(layer({"weight": weight}, x), x @ weight.mT / 4)
    assert (layer.domain, layer.codomain, layer.shape) == (Sequence(4), Logits(5), (5, 4))
    assert (layer.norm, layer.shape) == (Embedding(4, 5).norm, Embedding(4, 5).shape)
    # x along the largest row attains the gain
    row = weight[(weight.square().sum(1)).argmax()][None, None]
    ratio = Logits(5).norm(layer({"weight": weight}, row)) / Sequence(4).norm(row)
    assert float(ratio) == pytest.approx(float(layer.norm.size(weight)))


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None, "2"])
def test_an_unembedding_takes_positive_integers(wrong) -> None:
    for build in (lambda: Unembedding(wrong, 4), lambda: Unembedding(5, wrong), lambda: Embedding(wrong, 4)):
        with pytest.raises(InvalidArgument, match="integer of at least 1"):
            build()
    with pytest.raises(SpaceMismatch, match=r"Sequence\(4\)"):
        Unembedding(5, 4).bind(Features(4))
