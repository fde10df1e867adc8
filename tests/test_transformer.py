"""Transformers: their sizes against published ones, the map by hand, depths and ceilings, and that each learns."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modula_agd import (
    AGD,
    GPT,
    ClosedForm,
    CrossEntropy,
    Features,
    Image,
    InvalidArgument,
    LayerNorm,
    Linear,
    Logits,
    Module,
    Sequence,
    SpaceMismatch,
    SquareLoss,
    Tokens,
    Transformer,
    ViT,
    agd,
    residual,
)
from modula_agd.transformer import MIXING, self_attention
from support import central, gaussian, seeded, trained

F64 = {"dtype": torch.float64}
IDS = torch.arange(24).reshape(4, 6) * 3 % 11


def count(network: Module) -> int:
    return sum(math.prod(atom.shape) for atom in network.weights().values())


# -- sizes -----------------------------------------------------------------------------------------------------------------


def test_networks_of_usual_size_have_the_published_number_of_weights() -> None:
    # GPT-2, whose head is tied
    assert count(GPT(50257, 768, 12, 12, 1024, tied=True, bias=True, affine=True)) == 124_439_808
    # torchvision's vit_b_16 has a class token and its position besides
    vit = ViT(1000, 768, 12, 12, 3, 16, 224, bias=True, affine=True)
    assert count(vit) == 86_567_656 - 2 * 768


def block_weights(d: int, expansion: int, swiglu: bool, bias: bool, affine: bool) -> int:
    hidden = expansion * d
    attention = 4 * d * d + bias * 4 * d
    feed_forward = (3 if swiglu else 2) * d * hidden + bias * ((2 if swiglu else 1) * hidden + d)
    return attention + feed_forward + affine * 4 * d


@pytest.mark.parametrize("form", ["convex", "sum"])
@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
@pytest.mark.parametrize(("bias", "affine"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_transformer_has_the_weights_that_its_blocks_have(
    form: Any, feed_forward: Any, bias: bool, affine: bool
) -> None:
    options: dict[str, Any] = {
        "form": form,
        "feed_forward": feed_forward,
        "bias": bias,
        "affine": affine,
        "expansion": 3,
    }
    body = 2 * block_weights(8, 3, feed_forward == "swiglu", bias, affine) + affine * 2 * 8
    net = Transformer(8, 2, 2, **options)
    assert count(net) == body
    assert (net.domain, net.codomain) == (Sequence(8), Sequence(8))
    assert net(net.init(0), torch.ones(3, 5, 8)).shape == (3, 5, 8)

    for tied in (False, True):
        gpt = GPT(11, 8, 2, 2, 6, tied=tied, **options)
        assert count(gpt) == body + 11 * 8 + 6 * 8 + (0 if tied else 11 * 8 + bias * 11)
        assert sum(atom.shape == (11, 8) for atom in gpt.weights().values()) == (1 if tied else 2)
        rotary = GPT(11, 8, 2, 2, 6, tied=tied, rotary=True, **options)
        assert count(rotary) == count(gpt) - 6 * 8
        for network in (gpt, rotary):
            assert (network.domain, network.codomain) == (Tokens(11), Logits(11))
            assert network(network.init(0), IDS).shape == (4, 6, 11)

    vit = ViT(Logits(3), 8, 2, 2, 3, 4, 8, **options)
    assert count(vit) == body + 3 * 16 * 8 + 4 * 8 + 8 * 3 + bias * (8 + 3)
    assert (vit.domain, vit.codomain) == (Image(3), Logits(3))
    assert vit(vit.init(0), torch.ones(2, 3, 8, 8)).shape == (2, 3)


# -- the map ---------------------------------------------------------------------------------------------------------------


def test_a_gpt_is_what_its_description_says() -> None:
    net = GPT(11, 8, 2, 1, 6)
    params = net.init(0, **F64)
    token, position, qkv, merge, up, down, head = params.values()
    h = token[IDS] / 2 + position / 2

    def normalised(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (8,), eps=1e-6)

    q, k, v = (part.reshape(4, 6, 2, 4).transpose(1, 2) for part in (normalised(h) @ qkv.mT).chunk(3, -1))
    scores = (q @ k.mT / 4).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
    attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(4, 6, 8)
    h = h / 2 + attended @ merge.mT / 3 / 2
    h = h / 2 + math.sqrt(2) * functional.gelu(normalised(h) @ up.mT) @ down.mT / 2
    torch.testing.assert_close(net(params, IDS), normalised(h) @ head.mT)


def test_a_sum_form_with_biases_and_affine_norms_is_the_encoder_layer_of_torch() -> None:
    # torch scales scores by 1/sqrt(d) and has neither a third nor sqrt(2): undone in the weights
    theirs = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6, **F64
    )
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(gaussian(*parameter.shape, seed=seed) / 2)
    net = Transformer(8, 2, 1, expansion=2, form="sum", bias=True, affine=True)
    attention = theirs.self_attn
    weight, parts = attention.in_proj_weight.clone(), attention.in_proj_bias.reshape(3, 2, 4).clone()
    weight[:8], parts[0] = 2 * weight[:8], 2 * parts[0]
    # in order of application: norm, fused projection, its three biases, head; norm, two layers; last norm
    values = [
        theirs.norm1.weight, theirs.norm1.bias, weight, *parts,
        attention.out_proj.weight / MIXING, attention.out_proj.bias / MIXING,
        theirs.norm2.weight, theirs.norm2.bias, theirs.linear1.weight, theirs.linear1.bias,
        theirs.linear2.weight / math.sqrt(2), theirs.linear2.bias,
        torch.ones(8, **F64), torch.zeros(8, **F64),
    ]  # fmt: skip
    params = dict(zip(net.weights(), values, strict=True))
    x = gaussian(3, 5, 8)
    expected = functional.layer_norm(theirs.eval()(x), (8,), eps=1e-6)
    torch.testing.assert_close(net(params, x), expected)


@pytest.mark.parametrize("rotary", [False, True])
def test_scores_of_the_next_token_do_not_depend_on_it(rotary: bool) -> None:
    net = GPT(11, 8, 2, 2, 6, rotary=rotary)
    params, other = net.init(0, **F64), IDS.clone()
    other[:, 4:] = (other[:, 4:] + 5) % 11
    torch.testing.assert_close(net(params, IDS)[:, :4], net(params, other)[:, :4])
    assert not torch.allclose(net(params, IDS)[:, 4:], net(params, other)[:, 4:])
    # and a shorter text is a prefix
    torch.testing.assert_close(net(params, IDS[:, :3]), net(params, IDS)[:, :3])


def test_a_vision_transformer_sees_every_pixel_and_where_it_is() -> None:
    net = ViT(3, 8, 2, 1, 3, 4, 8)
    params, x = net.init(0, **F64), gaussian(2, 3, 8, 8)
    slope = torch.func.grad(lambda y: net(params, y).square().sum())(x)
    assert bool((slope.abs() > 0).all())
    assert not torch.allclose(net(params, x.flip(-1)), net(params, x))
    # without positions, patches in another order would be the same to it
    moved = torch.cat([x[..., 4:], x[..., :4]], -1)
    assert not torch.allclose(net(params, moved), net(params, x))
    where = next(name for name, value in params.items() if tuple(value.shape) == (4, 8))
    blind = {**params, where: torch.zeros(4, 8, **F64)}
    torch.testing.assert_close(net(blind, moved), net(blind, x))


@pytest.mark.parametrize(
    ("build", "embeddings"),
    [
        (lambda **options: GPT(11, 8, 2, 3, 6, **options), 1),
        (lambda **options: ViT(Logits(3), 8, 2, 3, 3, 4, 8, **options), 1),
        (lambda **options: Transformer(8, 2, 3, **options), 0),
    ],
    ids=["GPT", "ViT", "Transformer"],
)
def test_dropout_is_of_embeddings_attention_and_blocks(build: Callable[..., Module], embeddings: int) -> None:
    text = repr(build(dropout=0.25))
    assert text.count("dropout=0.25") == 3
    assert text.count(" Dropout(0.25)") + text.count("(Dropout(0.25)") == 2 * 3
    assert text.count("WithDropout(0.25, ") == embeddings
    assert "ropout" not in repr(build())
    # weights that were trained with it are at home without
    assert list(build(dropout=0.25).init(0)) == list(build().init(0))


def test_dropout_acts_in_training_alone() -> None:
    net, dropped = GPT(11, 8, 2, 1, 6), GPT(11, 8, 2, 1, 6, dropout=0.5)
    values = dropped.init(0).values()
    assert torch.equal(dropped(dropped.init(0), IDS), net(dict(zip(net.init(0), values, strict=True)), IDS))
    first, second = (dropped.run(dropped.init(0), IDS, generator=seeded(s))[0] for s in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "network",
    [
        GPT(7, 4, 2, 1, 6, tied=True, bias=True, affine=True),
        GPT(7, 4, 2, 1, 6, rotary=True, feed_forward="swiglu", form="sum"),
    ],
    ids=["tied", "rotary, gated"],
)
def test_gradients_are_those_of_finite_differences(network: Module) -> None:
    params, ids = network.init(0, **F64), IDS % 7
    method = agd(network, CrossEntropy())
    grads = torch.func.grad(method.objective)(params, ids, (ids + 1) % 7)
    for seed, (name, weight) in enumerate(params.items()):
        along = gaussian(*weight.shape, seed=seed)
        slope = central(lambda w, n=name: method.objective({**params, n: w}, ids, (ids + 1) % 7), weight, along, 1e-5)
        assert float((grads[name] * along).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9)


# -- bounds ----------------------------------------------------------------------------------------------------------------

MANY = (1, 2, 4, 8, 16, 64)


@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"feed_forward": "swiglu"}, {"bias": True, "affine": True}], ids=str
)
def test_the_depth_of_a_convex_stack_tends_to_a_limit_in_its_blocks(options: dict[str, Any]) -> None:
    # with one feature a head typical scores are as sensitive as the worst
    depths = [float(GPT(11, 8, 8, blocks, 6, **options).bound().depth) for blocks in MANY]
    gains = [later - earlier for earlier, later in pairwise(depths)]
    # from two blocks on, each doubling adds less than two thirds of what the last one did (in the limit, half)
    assert all(0 < later < 2 / 3 * earlier for earlier, later in pairwise(gains[1:-1]))
    assert gains[-1] < gains[-2]
    assert depths[-1] < 1.1 * depths[0]


def test_attention_alone_has_no_more_depth_in_many_blocks_than_in_one() -> None:
    depths = [float(residual(self_attention(8, 8), blocks).bound().depth) for blocks in MANY]
    assert depths[0] == pytest.approx(4)
    assert depths == sorted(depths, reverse=True)
    assert depths[-1] > 1


def test_the_depth_of_the_sum_form_grows_with_its_blocks() -> None:
    depths = [float(Transformer(8, 8, blocks, form="sum").bound().depth) for blocks in MANY]
    assert all(later > 1.5 * earlier for earlier, later in pairwise(depths))


@pytest.mark.parametrize("form", ["convex", "sum"])
def test_the_ceiling_is_finite_and_triples_with_each_block_of_attention(form: Any) -> None:
    # queries, keys and values each have the depth of all that went before: 3·(D̄ + 1) + 1, and two layers more
    ceiling = 0.0
    for blocks in range(1, 65):
        ceiling = 3 * (ceiling + 1) + 1 + 2
        if blocks in MANY:
            bound = Transformer(8, 2, blocks, form=form).bound()
            assert bound.ceiling == pytest.approx(ceiling)
            assert 0 < bound.depth <= bound.ceiling < math.inf


def test_exact_growth_sees_one_block_where_the_closed_form_sees_all() -> None:
    def step(blocks: int, **options: Any) -> float:
        net = GPT(11, 8, 2, blocks, 6)
        method, params = agd(net, CrossEntropy(), momentum=None, **options), net.init(0, **F64)
        grads = torch.func.grad(method.objective)(params, IDS, (IDS + 3) % 11)
        return float(method.update(grads, method.init(params), params)[1].t)

    # D is the same within 2%; the higher terms of the growth take the rest
    assert step(16) > 0.7 * step(1)
    assert step(16, search=ClosedForm()) < 1e-6 * step(1, search=ClosedForm())


def test_the_output_of_a_stack_has_magnitude_1_and_its_grounds_are_named() -> None:
    for blocks in (1, 4):
        bound = GPT(11, 8, 2, blocks, 6).bound()
        assert bound.magnitude == pytest.approx(1)
        assert any("LayerNorm()" in text and "typical" in text for text in bound.assumptions)
        assert any("QKV" in text for text in bound.assumptions)


NETWORKS: dict[str, tuple[Callable[[], Module], Tensor, Tensor]] = {
    name: (build, IDS, (IDS + 3) % 11)
    for name, build in {
        "GPT": lambda: GPT(11, 8, 2, 2, 6),
        "tied": lambda: GPT(11, 8, 2, 1, 6, tied=True),
        "rotary": lambda: GPT(11, 8, 2, 1, 6, rotary=True),
        "bias and affine": lambda: GPT(11, 8, 2, 1, 6, bias=True, affine=True, tied=True),
        "swiglu": lambda: GPT(11, 8, 2, 1, 6, feed_forward="swiglu", bias=True),
        "sum": lambda: GPT(11, 8, 2, 2, 6, form="sum"),
        "dropout": lambda: GPT(11, 8, 2, 1, 6, dropout=0.1),
    }.items()
} | {
    "ViT": (lambda: ViT(Logits(3), 8, 2, 1, 3, 4, 8), gaussian(6, 3, 8, 8), torch.arange(6) % 3),
    "ViT, all options": (
        lambda: ViT(Logits(3), 8, 2, 2, 3, 4, 8, bias=True, affine=True, form="sum", rotary=True, dropout=0.1),
        gaussian(6, 3, 8, 8),
        torch.arange(6) % 3,
    ),
    "Transformer": (
        lambda: Linear(Sequence(2), Sequence(8)) @ Transformer(8, 2, 1, causal=True),
        gaussian(4, 5, 8),
        gaussian(4, 5, 2, seed=1),
    ),
}
each_network = pytest.mark.parametrize("name", list(NETWORKS))


@each_network
@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.95}], ids=["full batch", "momentum"])
def test_each_learns_a_small_batch(name: str, options: dict[str, Any]) -> None:
    build, x, y = NETWORKS[name]
    loss = SquareLoss() if y.is_floating_point() else CrossEntropy()
    before, after = trained(build(), loss, x, y, **options)
    assert after < 0.95 * before


@each_network
def test_each_has_a_certificate_and_a_table(name: str) -> None:
    net, _, y = NETWORKS[name][0](), *NETWORKS[name][1:]
    certificate = agd(net, SquareLoss() if y.is_floating_point() else CrossEntropy()).certificate()
    assert any(repr(LayerNorm()) in text for text in certificate.assumptions)
    assert "ceiling depth" in str(net)


def test_the_optimizer_trains_a_tied_gpt_with_dropout() -> None:
    model = GPT(11, 8, 2, 1, 6, tied=True, dropout=0.1).to_torch(0)
    model.generator = seeded()
    optimizer, values = AGD(model, CrossEntropy(), momentum=0.95), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = CrossEntropy()(model(IDS), (IDS + 3) % 11)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    assert sum(tuple(p.shape) == (11, 8) for p in model.parameters()) == 1


# -- what they refuse ------------------------------------------------------------------------------------------------------

WRONG = [0, -1, 2.5, True, None, "2", float("nan"), (2,)]


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_are_positive_integers(wrong: Any) -> None:
    for build in (
        lambda: self_attention(wrong, 2),
        lambda: self_attention(8, wrong),
        lambda: Transformer(wrong, 2, 1),
        lambda: Transformer(8, wrong, 1),
        lambda: Transformer(8, 2, wrong),
        lambda: Transformer(8, 2, 1, expansion=wrong),
        lambda: GPT(wrong, 8, 2, 1, 6),
        lambda: GPT(11, wrong, 2, 1, 6),
        lambda: GPT(11, 8, wrong, 1, 6),
        lambda: GPT(11, 8, 2, wrong, 6),
        lambda: GPT(11, 8, 2, 1, wrong),
        lambda: GPT(11, 8, 2, 1, wrong, rotary=True),
        lambda: ViT(wrong, 8, 2, 1),
        lambda: ViT(3, wrong, 2, 1),
        lambda: ViT(3, 8, 2, 1, wrong),
        lambda: ViT(3, 8, 2, 1, 3, wrong),
        lambda: ViT(3, 8, 2, 1, 3, 4, wrong),
    ):
        # a tuple of heads is no number that divides, a string no width
        with pytest.raises(InvalidArgument, match=r"integer of at least 1|must divide"):
            build()


@pytest.mark.parametrize("wrong", ["none", None, 1, 0.0])
def test_yes_or_no_is_true_or_false(wrong: Any) -> None:
    for option in ("bias", "affine", "causal", "rotary"):
        with pytest.raises(InvalidArgument, match="True or False"):
            Transformer(8, 2, 1, **{option: wrong})
    for option in ("tied", "rotary", "bias"):
        with pytest.raises(InvalidArgument, match="True or False"):
            GPT(11, 8, 2, 1, 6, **{option: wrong})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Transformer(8, 3, 1), "3 heads.*divide the width 8"),
        (lambda: Transformer(8, 2, 1, form="residual"), "'convex' or 'sum'"),  # pyright: ignore[reportArgumentType]
        (lambda: Transformer(8, 2, 1, feed_forward="relu"), "'gelu' or 'swiglu'"),  # pyright: ignore[reportArgumentType]
        (lambda: Transformer(8, 2, 1, dropout=1.0), "below 1"),
        (lambda: Transformer(8, 2, 1, dropout=None), "below 1"),  # pyright: ignore[reportArgumentType]
        (lambda: ViT(3, 8, 2, 1, patch=5), "5×5.*divide the image's 32"),
    ],
)
def test_options_that_cannot_be_are_an_error(build: Callable[[], Module], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        build()


def test_rotary_positions_need_heads_of_even_width() -> None:
    with pytest.raises(SpaceMismatch, match=r"even.*Heads\(2, 3\)"):
        Transformer(6, 2, 1, rotary=True)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (IDS.float(), SpaceMismatch, r"Tokens\(11\) = integer ids"),
        (IDS > 3, SpaceMismatch, "integer ids"),
        (functional.one_hot(IDS, 11), SpaceMismatch, "integer ids"),
        (torch.zeros(2, 7, dtype=torch.int64), InvalidArgument, "sequence of 7, but has 6 positions"),
        (IDS + 1, InvalidArgument, r"outside 0\.\.10"),
        (IDS - 1, InvalidArgument, r"outside 0\.\.10"),
        ([[1, 2]], SpaceMismatch, "list"),
        (torch.tensor(3), SpaceMismatch, "no positions"),
    ],
    ids=["floats", "booleans", "one-hot", "too long", "id too large", "negative id", "a list", "one id"],
)
def test_token_ids_that_do_not_fit_are_refused(x: Any, error: type[Exception], message: str) -> None:
    net = GPT(11, 8, 2, 1, 6)
    for use in (net, net.run, net.to_torch(0).__call__):
        arguments = (x,) if use not in (net, net.run) else (net.init(0), x)
        with pytest.raises(error, match=message):
            use(*arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3, 9, 9), "images of 8×8 pixels was given 9×9"),
        (torch.ones(2, 3, 4, 16), "4×16"),
        (torch.ones(2, 3, 12, 12), "12×12"),
        (torch.ones(2, 1, 8, 8), r"Image\(3\)"),
        (torch.ones(2, 8, 8, 3), r"Image\(3\)"),
        (torch.ones(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
    ],
    ids=["rest of a patch", "another shape", "larger", "grey", "channels last", "integers"],
)
def test_images_that_do_not_fit_are_refused(x: Tensor, message: str) -> None:
    net = ViT(3, 8, 2, 1, 3, 4, 8)
    with pytest.raises(SpaceMismatch, match=message):
        net(net.init(0), x)


def test_a_transformer_takes_sequences_of_its_width() -> None:
    net = Transformer(8, 2, 1)
    for x in (torch.ones(2, 5, 7), torch.ones(8), torch.ones(2, 5, 8, dtype=torch.int64), torch.ones(1, 2, 5, 8)):
        with pytest.raises(SpaceMismatch, match=r"Sequence\(8\)"):
            net(net.init(0), x)
    with pytest.raises(SpaceMismatch, match=r"x\[:, None\]"):
        net.run(net.init(0), torch.ones(5, 8))
    with pytest.raises(SpaceMismatch):
        net @ Linear(8, 4)
    assert net(net.init(0), torch.ones(5, 8)).shape == (5, 8)
    assert (Linear(Sequence(3), Sequence(8)) @ net).codomain == Sequence(3) != Features(3)
