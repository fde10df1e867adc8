"""Attention against torch's own, its masks, its bound in the sharp and in the convex form, and what it refuses."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import modula_agd
from modula_agd import (
    QKV,
    Attention,
    Bias,
    Bound,
    Dropout,
    Features,
    Grade,
    Heads,
    Identity,
    InvalidArgument,
    Linear,
    Logits,
    Mask,
    MergeHeads,
    Module,
    Rotary,
    Sequence,
    Space,
    SpaceMismatch,
    SplitHeads,
    Take,
    UnknownBound,
    each,
)
from modula_agd import bound as algebra
from modula_agd.run import Step
from modula_agd.space import Tuple
from support import central, gaussian, seeded

F64 = {"dtype": torch.float64}
HEADS = Heads(2, 3)
THREE = Tuple((HEADS,) * 3)


def projected(batch: int = 4, time: int = 5, space: Heads = HEADS, seed: int = 0) -> tuple[Tensor, ...]:
    shape = batch, space.heads, time, space.width
    return tuple(gaussian(*shape, seed=seed + index) for index in range(3))


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None) -> Tensor:
    scores = scale * torch.einsum("bhqd,bhkd->bhqk", q, k)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


# -- the map ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_softmax_of_scores_times_values(causal: bool, scale: float | None) -> None:
    q, k, v = projected()
    seen = torch.ones(5, 5, dtype=torch.bool).tril() if causal else None
    out = Attention(causal=causal, scale=scale).bind(THREE)({}, (q, k, v))
    torch.testing.assert_close(out, by_hand(q, k, v, 1 / 3 if scale is None else scale, seen))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_self_attention_is_that_of_torch_with_the_same_weights(bias: bool, causal: bool) -> None:
    theirs = nn.MultiheadAttention(6, 2, bias=bias, batch_first=True, **F64)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(gaussian(*parameter.shape, seed=parameter.numel()))
    heads: Module = QKV(2, 3, 6)
    head: Module = Linear(Sequence(6), Sequence(6))
    params = {"0.weight": theirs.in_proj_weight, "3.weight": theirs.out_proj.weight}
    if bias:
        heads, head = each(Bias(HEADS), Bias(HEADS), Bias(HEADS)) @ heads, Bias(Sequence(6)) @ head
        parts = theirs.in_proj_bias.reshape(3, 2, 3)
        params = {"0.weight": theirs.in_proj_weight, "4.weight": theirs.out_proj.weight, "5.bias": theirs.out_proj.bias}
        params |= {f"1.{index}.bias": parts[index] for index in range(3)}
    # torch's scores are divided by sqrt(d)
    ours = head @ MergeHeads() @ Attention(causal=causal, scale=3**-0.5) @ heads
    x = gaussian(4, 5, 6)
    mask = nn.Transformer.generate_square_subsequent_mask(5, **F64) if causal else None
    expected = theirs(x, x, x, attn_mask=mask, is_causal=causal, need_weights=False)[0]
    torch.testing.assert_close(ours(params, x), expected)


def test_queries_and_keys_may_come_from_sequences_of_other_lengths_and_values_have_another_width() -> None:
    q, k, v = gaussian(2, 2, 3, 4), gaussian(2, 2, 7, 4, seed=1), gaussian(2, 2, 7, 5, seed=2)
    cross = Attention().bind(Tuple((Heads(2, 4), Heads(2, 4), Heads(2, 5))))
    assert cross.codomain == Heads(2, 5)
    torch.testing.assert_close(cross({}, (q, k, v)), by_hand(q, k, v, 1 / 4))


def test_splitting_is_undone_by_merging_and_is_what_the_fused_projection_does() -> None:
    x = gaussian(4, 5, 6)
    split = SplitHeads(2).bind(Sequence(6))
    assert (split.codomain, (MergeHeads() @ split).codomain) == (HEADS, Sequence(6))
    assert torch.equal((MergeHeads() @ split)({}, x), x)
    assert torch.equal(split({}, x)[:, 1, 2], x[:, 2, 3:])
    params = QKV(2, 3, 6).init(0, **F64)
    keys = (Take(1) @ QKV(2, 3, 6))({"0.weight": params["weight"]}, x)
    torch.testing.assert_close(keys, split({}, x @ params["weight"][6:12].mT))


def test_one_sequence_without_a_batch_is_attended_to_like_a_batch_of_one() -> None:
    net = MergeHeads() @ Attention(causal=True) @ QKV(2, 3, 6)
    params, x = net.init(0, **F64), gaussian(4, 5, 6)
    torch.testing.assert_close(net(params, x[0]), net(params, x)[0])
    torch.testing.assert_close(torch.func.vmap(net, (None, 0))(params, x), net(params, x))


# -- masks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", [False, True])
def test_causal_attention_does_not_depend_on_later_positions(rotary: bool) -> None:
    turned: Module = each(Rotary(), Rotary(), Identity()) @ QKV(2, 4, 6) if rotary else QKV(2, 4, 6)
    net = MergeHeads() @ Attention(causal=True) @ turned
    params, x = net.init(0, **F64), gaussian(2, 5, 6)
    for time in range(5):
        slope = torch.func.grad(lambda y, time=time: net(params, y)[:, time].sum())(x).abs().sum((0, 2))
        assert (slope > 0).tolist() == [position <= time for position in range(5)]


def test_a_mask_of_numbers_is_refused_where_the_network_has_no_domain_to_refuse_it() -> None:
    net = MergeHeads() @ Attention() @ (QKV(2, 3, 6) @ Take(0), Take(1))
    assert net.domain is None
    x, mask = gaussian(2, 4, 6), torch.ones(2, 4, dtype=torch.bool)
    assert net(net.init(0, **F64), (x, mask)).shape == (2, 4, 6)
    with pytest.raises(SpaceMismatch, match=r"a mask of torch\.float32.*mask\.bool"):
        net(net.init(0, **F64), (x, mask.float()))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_as_good_as_cutting_the_sequence(causal: bool) -> None:
    lengths = torch.tensor([5, 3, 1])
    mask = torch.arange(5) < lengths[:, None]
    qkv = projected(batch=3)
    out = Attention(causal=causal).bind(Tuple((THREE, Mask())))({}, (qkv, mask))
    for index, length in enumerate(lengths.tolist()):
        cut = tuple(part[index : index + 1, :, :length] for part in qkv)
        expected = Attention(causal=causal).bind(THREE)({}, cut)[0]
        torch.testing.assert_close(out[index, :, :length], expected)


def test_a_mask_travels_beside_the_sequence_in_a_typed_network() -> None:
    net = Linear(Logits(3), Sequence(6)) @ MergeHeads() @ Attention() @ each(QKV(2, 3, 6), Identity().bind(Mask()))
    assert net.domain == Tuple((Sequence(6), Mask()))
    params, x = net.init(0, **F64), gaussian(2, 4, 6)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    other = torch.where(mask[..., None], x, 7.0)
    torch.testing.assert_close(net(params, (x, mask))[mask], net(params, (other, mask))[mask])
    assert net.bound(0.1).growth > 1.1
    # sample by sample, as for gradients of each
    by_sample = torch.func.vmap(lambda y, seen: net(params, (y, seen)))(x, mask)
    torch.testing.assert_close(by_sample, net(params, (x, mask)))
    with pytest.raises(SpaceMismatch):
        net(params, (x, mask.float()))
    with pytest.raises(SpaceMismatch):
        net(params, x)


@pytest.mark.parametrize(
    ("causal", "mask"), [(False, [[True] * 4, [False] * 4]), (True, [[True] * 4, [False] + [True] * 3])]
)
def test_a_position_with_nothing_to_attend_to_is_an_error(causal: bool, mask: list[list[bool]]) -> None:
    attention = Attention(causal=causal).bind(Tuple((THREE, Mask())))
    with pytest.raises(InvalidArgument, match="nothing to attend to"):
        attention({}, (projected(batch=2, time=4), torch.tensor(mask)))


def test_gradients_through_masked_attention_are_those_of_finite_differences() -> None:
    net = MergeHeads() @ Attention(causal=True) @ each(QKV(2, 3, 6), Identity().bind(Mask()))
    params, x, mask = net.init(0, **F64), gaussian(2, 4, 6), torch.tensor([[True] * 4, [True, True, False, False]])
    aim = gaussian(2, 4, 6, seed=9)

    def value(weight: Tensor) -> Tensor:
        return (net({"0.0.weight": weight}, (x, mask)) * aim).sum()

    weight, along = params["0.0.weight"], gaussian(18, 6, seed=3)
    slope = torch.func.grad(value)(weight)
    assert float((slope * along).sum()) == pytest.approx(central(value, weight, along), rel=1e-7)
    leaf = weight.clone().requires_grad_()
    value(leaf).backward()
    torch.testing.assert_close(leaf.grad, slope)


# -- dropout ---------------------------------------------------------------------------------------------------------------


def kept(p: float, *shape: int, seed: int = 0) -> Tensor:
    """What dropout multiplies weights of that shape with."""
    return (torch.rand(shape, generator=seeded(seed)) >= p) / (1 - p)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_dropped_after_the_softmax(causal: bool, padded: bool) -> None:
    qkv, mask = projected(batch=3), torch.arange(5) < torch.tensor([[5], [3], [1]])
    seen = torch.ones(3, 2, 5, 5, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    seen = seen & mask[:, None, None] if padded else seen
    attention = Attention(causal=causal, dropout=0.4).bind(Tuple((THREE, Mask())) if padded else THREE)
    out = attention.run({}, (qkv, mask) if padded else qkv, generator=seeded())[0]
    scores = (torch.einsum("bhqd,bhkd->bhqk", *qkv[:2]) / 3).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) * kept(0.4, 3, 2, 5, 5)) @ qkv[2])


@pytest.mark.parametrize("fused", [False, True], ids=["drawn here", "in the kernel"])
def test_dropped_weights_are_right_in_the_mean_and_whole_in_evaluation(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modula_agd.attention._in_kernel", lambda generator, device: fused)
    q, k, v = projected(batch=1)
    many = tuple(part.expand(4000, -1, -1, -1) for part in (q, k, v))
    attention, whole = (
        Attention(causal=True, dropout=0.4).bind(THREE),
        Attention(causal=True).bind(THREE)({}, (q, k, v)),
    )
    generator = torch.default_generator if fused else torch.Generator()
    first, again, other = (attention.run({}, many, generator=generator.manual_seed(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # the first position sees itself alone: a share p of its outputs is 0
    alone = first[:, :, 0].abs().sum(-1) == 0
    assert float(alone.double().mean()) == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / 8000))
    # five standard errors of the mean, of what each weight adds to the variance at most
    error = 5 * math.sqrt(0.4 / 0.6 / 4000) * float(v.abs().max())
    torch.testing.assert_close(first.mean(0, keepdim=True), whole, rtol=0, atol=error)
    assert torch.equal(attention({}, (q, k, v)), whole)


def test_generators_in_one_state_drop_the_same_weights() -> None:
    attention, qkv = Attention(dropout=0.4).bind(THREE), projected()
    generator = torch.default_generator.manual_seed(5)
    copied = generator.clone_state()
    assert torch.equal(*(attention.run({}, qkv, generator=each)[0] for each in (generator, copied)))


def test_dropped_weights_draw_from_their_generator_alone_and_need_one() -> None:
    attention, qkv = Attention(dropout=0.4).bind(THREE), projected()
    before = torch.get_rng_state()
    attention.run({}, qkv, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InvalidArgument, match=r"Attention\(dropout=0\.4\).*torch\.Generator"):
        attention.run({}, qkv)
    # nothing to drop, nothing to draw
    assert torch.equal(Attention().bind(THREE).run({}, qkv)[0], Attention().bind(THREE)({}, qkv))


def test_what_sees_nothing_comes_out_as_0_where_no_host_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modula_agd.attention._empties_a_row", lambda seen: False)
    attention = Attention(dropout=0.4).bind(Tuple((THREE, Mask())))
    qkv = tuple(part.requires_grad_() for part in projected(batch=1, time=3))
    out = attention.run({}, (qkv, torch.zeros(1, 3, dtype=torch.bool)), generator=seeded())[0]
    assert torch.equal(out, torch.zeros_like(out))
    grads = torch.autograd.grad(out.sum(), qkv)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_gradients_through_dropped_weights_are_those_of_finite_differences() -> None:
    net = MergeHeads() @ Attention(causal=True, dropout=0.3) @ QKV(2, 3, 6)
    weight, x, aim, along = (
        net.init(0, **F64)["0.weight"],
        gaussian(2, 4, 6),
        gaussian(2, 4, 6, seed=9),
        gaussian(18, 6),
    )

    def value(w: Tensor) -> Tensor:
        return (net.run({"0.weight": w}, x, generator=seeded())[0] * aim).sum()

    slope = torch.func.grad(value)(weight)
    assert float((slope * along).sum()) == pytest.approx(central(value, weight, along), rel=1e-7)


@pytest.mark.parametrize("constants", ["proved", "typical"])
def test_dropped_weights_are_bounded_like_dropped_outputs(constants: Any) -> None:
    dropped = (Attention(dropout=0.36) @ QKV(2, 3, 6)).bound(0.1, constants=constants)
    expected = (Dropout(0.36) @ Attention() @ QKV(2, 3, 6)).bound(0.1, constants=constants)
    assert dropped.magnitude == pytest.approx(expected.magnitude)
    assert (dropped.growth, dropped.depth, dropped.error) == (expected.growth, expected.depth, expected.error)
    # 1/(1 − p), or its root
    whole = (Attention() @ QKV(2, 3, 6)).bound(0.1, constants=constants)
    assert dropped.magnitude == pytest.approx(whole.magnitude / (0.64 if constants == "proved" else 0.8))


@pytest.mark.parametrize("wrong", [1, -0.1, True, None, "0.5", float("nan")])
def test_a_share_of_weights_to_drop_is_below_1(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"dropout of an Attention.*below 1"):
        Attention(dropout=wrong)


# -- the bound -------------------------------------------------------------------------------------------------------------


def tug(groups: int, queries: float, keys: float, values: float) -> tuple[float, Bound, float]:
    """How far attention moves where one key pulls against ``groups`` opposite ones, its declared bound, and σ."""
    # weight passes from one group to the other when their log-odds pass from −ε to ε: log(groups) = 2σ + ε
    sigma = math.log(groups) / (1 + queries * keys)
    sign = torch.tensor([1.0] + [-1.0] * groups, **F64)[None, None, :, None].expand(1, 1, -1, 3)
    attention = Attention(scale=sigma / 3).bind(Tuple((Heads(1, 3),) * 3))
    before = torch.ones(1, 1, 1, 3, **F64), sign, sign
    after = queries * before[0], keys * sign, sign + (values - 1)
    moved = float(Heads(1, 3).norm(attention({}, after) - attention({}, before)))
    start = tuple(Bound(1.0, growth, 0.0, 0.0, 0.0) for growth in (queries, keys, values))
    return moved, attention.propagate(start, Step(constants="proved")), sigma


@pytest.mark.parametrize("groups", [2, 7, 40])
@pytest.mark.parametrize(("queries", "keys", "values"), [(1.1, 1.2, 1.3), (1.0, 1.5, 1.0), (2.0, 3.0, 1.01)])
def test_the_sharp_form_of_the_growth_is_attained(groups: int, queries: float, keys: float, values: float) -> None:
    moved, bound, sigma = tug(groups, queries, keys, values)
    sharp = values + 2 * math.tanh(sigma * (queries * keys - 1) / 2)
    assert moved == pytest.approx(bound.magnitude * (sharp - 1), rel=1e-12)
    assert bound.growth == pytest.approx(values + sigma * (queries * keys - 1), rel=1e-12)
    assert sharp <= bound.growth


def test_the_convex_form_is_attained_by_small_steps() -> None:
    for step in (1e-2, 1e-3, 1e-4):
        moved, bound, _ = tug(7, 1 + step, 1 + step, 1 + step)
        assert 1 - step**2 <= moved / (bound.growth - 1) <= 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_no_random_step_moves_attention_further_than_the_sharp_form(scale: float, causal: bool) -> None:
    space, worst = Heads(2, 2), 0.0
    attention = Attention(causal=causal, scale=scale / 2).bind(Tuple((space,) * 3))
    for seed in range(40):
        # keys on a line and long sequences come nearer to the bound than Gaussian draws
        qkv = [x / space.norm(x).amax() for x in projected(8, 6, space, seed=10 * seed)]
        qkv[1] = qkv[1].sign()
        grown = [1 + 0.5 * float(r) for r in torch.rand(3, generator=seeded(seed))]
        steps = [x / space.norm(x).amax() for x in projected(8, 6, space, seed=10 * seed + 5)]
        steps[1] = qkv[1] if seed % 2 else steps[1]
        moved = [x + (g - 1) * s for x, g, s in zip(qkv, grown, steps, strict=True)]
        change = space.norm(attention({}, tuple(moved)) - attention({}, tuple(qkv))).amax()
        sharp = grown[2] + 2 * math.tanh(scale * (grown[0] * grown[1] - 1) / 2)
        worst = max(worst, float(change) / (sharp - 1))
    assert 0.1 < worst <= 1


def fused(x: Bound, t: float, masses: tuple[float, float, float], width: int, scale: float) -> Bound:
    queries, keys, values = (algebra.atom(x, 1.0, mass * t, mass) for mass in masses)
    return algebra.attention(queries, keys, values, scale * width)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("masses", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.25), (0.0, 1.0, 3.0)])
def test_depth_is_the_slope_of_the_growth_and_the_ceiling_bounds_its_logarithm(
    sigma: float, masses: tuple[float, float, float]
) -> None:
    for before in (algebra.source(), algebra.atom(algebra.source(), 1.0, 0.0, 1.0)):

        def growth(t: float, deep: bool = before.depth > 0) -> Bound:
            x = algebra.atom(algebra.source(), 1.0, t, 1.0) if deep else algebra.source()
            return fused(x, t, masses, 4, sigma / 4)

        at_rest, h = growth(0.0), 1e-6
        slope = (growth(h).growth - growth(-h).growth) / (2 * h)
        assert at_rest.depth == pytest.approx(slope, rel=1e-8)
        assert at_rest.depth == pytest.approx(
            masses[2] + before.depth + sigma * (masses[0] + masses[1] + 2 * before.depth)
        )
        assert at_rest.depth <= at_rest.ceiling
        for t in (1e-3, 0.1, 0.5, 1.0, 3.0):
            assert math.log(growth(t).growth) <= at_rest.ceiling * t * (1 + 1e-12)
            # κ never exceeds what is left of γ after its slope, where the softmax's own share is counted in
            assert growth(t).error >= 0


def test_the_error_has_the_second_derivative_of_its_rule() -> None:
    sigma, t = 0.8, 1e-4
    bound = fused(algebra.source(), t, (1.0, 1.0, 1.0), 4, sigma / 4)
    # ε·(γ_v − 1) + 2/(3·sqrt 3)·ε² + σ·(γ_q − 1)·(γ_k − 1) with ε = σ·(γ_q·γ_k − 1) ≈ 2σt
    leading = 2 * sigma + 8 * sigma**2 / (3 * math.sqrt(3)) + sigma
    assert bound.error / t**2 == pytest.approx(leading, rel=1e-3)


def test_the_curvature_of_a_softmax_in_l1_is_attained() -> None:
    # two groups whose log-odds move by 2ε: the remainder of both together is 4·max σ″·ε² = 2/(3·sqrt 3)·ε²
    log_odds, step = torch.linspace(-4, 4, 4001, **F64), 1e-3
    remainder = torch.sigmoid(log_odds + 2 * step) - torch.sigmoid(log_odds)
    slope = torch.sigmoid(log_odds) * (1 - torch.sigmoid(log_odds))
    largest = 2 * (remainder - 2 * step * slope).abs().amax() / step**2
    assert float(largest) == pytest.approx(2 / (3 * math.sqrt(3)), rel=1e-4)
    for seed in range(30):
        logits, change = 3 * gaussian(50, 6, seed=seed), gaussian(50, 6, seed=seed + 50).sign()
        p, linear = torch.func.jvp(lambda z: z.softmax(-1), (logits,), (change,))
        left = ((logits + step * change).softmax(-1) - p - step * linear).abs().sum(-1) / step**2
        assert float(left.amax()) <= 2 / (3 * math.sqrt(3)) * (1 + 1e-6)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_what_linearising_leaves_out_is_within_the_error(scale: float | None) -> None:
    net = MergeHeads() @ Attention(scale=scale) @ QKV(2, 3, 6)
    ratios = []
    for seed in range(20):
        params, x = net.init(seed, **F64), gaussian(3, 5, 6, seed=seed).sign()
        norm, t = QKV(2, 3, 6).norm, 0.2
        draw = gaussian(18, 6, seed=seed + 50)
        step = {"0.weight": t * draw / norm.size(draw)}
        with sdpa_kernel(SDPBackend.MATH):
            # torch's fused kernels have no forward mode
            before, linear = torch.func.jvp(lambda w, x=x: net(w, x), (params,), (step,))
        left = net({"0.weight": params["0.weight"] + step["0.weight"]}, x) - before - linear
        bound = net.bound(t, constants="proved")
        ratios.append(float(Sequence(6).norm(left).amax() / (bound.magnitude * bound.error)))
    assert 1e-3 < max(ratios) <= 1


def test_splitting_costs_the_square_root_of_the_heads_in_the_worst_case_alone() -> None:
    for module in (SplitHeads(4), QKV(4, 2, 8)):
        assert module.gain.proved.value == 2
        assert (module.gain.typical.value, module.gain.typical.grade) == (1, Grade.TYPICAL)
    for module in (SplitHeads(1), QKV(1, 2, 8), QKV(4, 2, 8, per_head=True)):
        assert module.gain.proved.value == module.gain.typical.value == 1
        assert module.gain.typical.grade == Grade.PROVED
    x = torch.zeros(1, 1, 8, **F64)
    x[..., :2] = 1
    assert float(Heads(4, 2).norm(SplitHeads(4)({}, x)) / Sequence(8).norm(x)) == pytest.approx(2)
    # σ of the whole: heads may all be as large as sqrt(h) at once in the worst case
    assert (Attention() @ QKV(4, 2, 8)).bound(constants="proved").depth == pytest.approx(1 + 2 * 4)
    assert (Attention() @ QKV(4, 2, 8)).bound().depth == pytest.approx(1 + 2 / math.sqrt(2))


@pytest.mark.parametrize("width", [1, 4, 64])
def test_typical_scores_are_as_sensitive_as_products_of_independent_features(width: int) -> None:
    attention = Attention().bind(Tuple((Heads(2, width),) * 3))
    q, k = (gaussian(4000, width, seed=seed) for seed in (1, 2))
    scores = (q * k).sum(-1) / width
    assert attention.gain.typical.value == pytest.approx(float(scores.std()), rel=0.05)
    assert attention.gain.proved.value == 1


@pytest.mark.parametrize("per_head", [False, True])
def test_the_fused_weight_is_drawn_and_measured_part_by_part(per_head: bool) -> None:
    layer = QKV(2, 3, 8, per_head=per_head)
    weight = layer.init(0, **F64)["weight"]
    assert tuple(weight.shape) == layer.shape == (18, 8)
    blocks = weight.reshape(6 if per_head else 3, -1, 8)
    sizes = torch.linalg.matrix_norm(blocks, 2) * math.sqrt(8 / blocks.shape[1])
    torch.testing.assert_close(sizes, torch.ones_like(sizes))
    weight = torch.cat([weight[:-1], 2 * weight[-1:]])
    assert float(layer.norm.size(weight)) > 1


# -- what it refuses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None, "2", float("nan"), (2,)])
def test_numbers_of_heads_and_features_are_positive_integers(wrong: Any) -> None:
    for build in (
        lambda: QKV(wrong, 3, 6),
        lambda: QKV(2, wrong, 6),
        lambda: QKV(2, 3, wrong),
        lambda: SplitHeads(wrong),
        lambda: Heads(wrong, 3),
        lambda: Heads(2, wrong),
    ):
        with pytest.raises(InvalidArgument, match="integer of at least 1"):
            build()


@pytest.mark.parametrize("wrong", [0, -1.0, True, "1", float("nan"), float("inf"), (1,)])
def test_a_score_scale_is_a_finite_number_above_0(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="score scale"):
        Attention(scale=wrong)


@pytest.mark.parametrize("wrong", [None, 1, "yes", float("nan")])
def test_a_choice_is_true_or_false(wrong: Any) -> None:
    for build in (lambda: Attention(causal=wrong), lambda: QKV(2, 3, 6, per_head=wrong)):
        with pytest.raises(InvalidArgument, match="True or False"):
            build()


@pytest.mark.parametrize(
    ("module", "space"),
    [
        (Attention(), HEADS),
        (Attention(), Tuple((HEADS, HEADS))),
        (Attention(), Tuple((HEADS, HEADS, Heads(3, 3)))),
        (Attention(), Tuple((HEADS, Heads(2, 4), HEADS))),
        (Attention(), Tuple((HEADS, HEADS, HEADS, Mask()))),
        (Attention(), Tuple((Sequence(6),) * 3)),
        (Attention(), Tuple((THREE, HEADS))),
        (SplitHeads(2), Sequence(5)),
        (SplitHeads(2), Features(6)),
        (MergeHeads(), Sequence(6)),
        (QKV(2, 3, 6), Sequence(5)),
        (QKV(2, 3, 6), Features(6)),
        (Linear(HEADS, Sequence(6)), Features(6)),
    ],
    ids=str,
)
def test_a_space_that_does_not_fit_is_named_with_the_module(module: Module, space: Space) -> None:
    with pytest.raises(SpaceMismatch) as caught:
        module.bind(space)
    assert repr(module) in str(caught.value)
    assert str(space) in str(caught.value)


@pytest.mark.parametrize("x", [gaussian(1, 2, 3, 3), (gaussian(1, 2, 3, 3),) * 2, None, ((gaussian(1, 2, 3, 3),) * 3,)])
def test_an_attention_of_open_spaces_refuses_what_is_no_triple(x: Any) -> None:
    with pytest.raises(SpaceMismatch, match="takes a tuple of"):
        Attention()({}, x)
    with pytest.raises(UnknownBound, match="takes a tuple of 3"):
        Attention().bound()
    assert str(Attention()) == "Attention()"


def test_a_projection_into_heads_takes_a_sequence() -> None:
    with pytest.raises(SpaceMismatch, match="Features or Logits"):
        Linear(Heads(2, 3), 6)


@pytest.mark.parametrize(
    "module",
    [
        QKV(2, 3, 6),
        QKV(2, 3, 6, per_head=True),
        SplitHeads(2),
        MergeHeads(),
        Attention(),
        Attention(causal=True, scale=0.5),
        Attention(causal=True, dropout=0.1),
    ],
)
def test_a_repr_is_the_expression_that_builds_it(module: Module) -> None:
    assert eval(repr(module), dict(vars(modula_agd))) == module


def test_a_mass_reaches_the_fused_weight() -> None:
    halved = (Attention() @ QKV(2, 3, 6)).with_mass(0.5)
    assert halved == Attention() @ replace(QKV(2, 3, 6), mass=0.5)
    assert halved.bound().depth == pytest.approx(0.5 * (1 + 2 / math.sqrt(3)))
