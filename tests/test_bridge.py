"""Captured models: what each parameter is found to be, that the function is the same, that bad models are told what is wrong."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modula_agd import (
    Certified,
    Conv2d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    CrossEntropy,
    InvalidArgument,
    Logits,
    RowBlocks,
    RowNorm,
    Sign,
    SpaceMismatch,
    Spectral,
    SquareLoss,
    UnknownBound,
    agd,
    declare,
    from_torch,
)
from modula_agd.bridge import Bridged, undeclare
from modula_agd.bridge.weights import size_of
from modula_agd.kernel_norm import Unfolded
from modula_agd.norm import Transposed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "bridge"))
models = importlib.import_module("models")

# the library's own warnings are errors; those of other people's models are theirs
pytestmark = [
    pytest.mark.usefixtures("torchvision_models"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LARGE = ("resnet18", "resnet50")
QUICK = [name for name in models.SOURCES if name not in LARGE]


@pytest.fixture(scope="module")
def data():
    return models.made_up()


def task_of(name: str, data: Any):
    """The model, or a skip where its package is not installed."""
    pytest.importorskip(models.SOURCES[name][1])
    return models.task(name, data)


def first_batch(task: Any) -> tuple[Any, Tensor]:
    return task.batch(torch.Generator().manual_seed(1))


def trained(task: Any, network: Bridged, steps: int) -> list[float]:
    """Losses of so many steps, in a loop of the user's own, multiplier 1."""
    method = agd(network, task.loss)
    params = network.parameters()
    state = method.init(params)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        value, updates, state = models.step(task, method, params, state, task.batch(generator))
        models.move(params, updates)
        losses.append(value)
    return losses


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_a_model_that_nobody_here_wrote(name: str, data) -> None:
    task = task_of(name, data)
    inputs, _ = first_batch(task)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    network = from_torch(task.model, inputs)
    # captured, and left as it was
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    # the same function
    task.model.eval()
    with torch.no_grad():
        direct = models.applied(task.model, inputs)
        bridged = network(network.parameters(), inputs)
    task.model.train()
    assert torch.equal(direct, bridged)
    # a table with every parameter that reaches the output
    table = str(network)
    named = dict(task.model.named_parameters())
    task.model.zero_grad()
    models.applied(task.model, inputs).sum().backward()
    reached = {key for key, value in named.items() if value.grad is not None}
    assert set(network.weights()) == reached
    assert all(key in table for key in reached)
    # one step, and a loss that falls
    losses = trained(task, network, 30)
    assert sum(losses[-5:]) / 5 < 0.97 * sum(losses[:3]) / 3, losses


@pytest.mark.slow
@pytest.mark.parametrize("name", list(models.SOURCES))
def test_the_loss_falls_over_fifty_steps(name: str, data) -> None:
    """On twenty batches that no step is made of: those of a few steps, of sixteen samples each, differ by more than is learnt here."""
    task, generator = task_of(name, data), torch.Generator().manual_seed(3)
    batches = [task.batch(generator) for _ in range(20)]

    def loss() -> float:
        with torch.no_grad():
            return sum(float(task.loss(models.applied(task.model, x), y)) for x, y in batches) / len(batches)

    network, before = from_torch(task.model, first_batch(task)[0]), loss()
    losses = trained(task, network, 50)
    assert loss() < 0.95 * before, losses


# -- what a parameter is -------------------------------------------------------------------------------------------------


def norms(network: Bridged) -> dict[str, Any]:
    return {name: weight.norm for name, weight in network.declarations.items()}


def test_fused_projections_count_part_by_part(data) -> None:
    gpt2 = task_of("gpt2", data)
    found = norms(from_torch(gpt2.model, first_batch(gpt2)[0]))
    assert found["transformer.h.0.attn.c_attn.weight"] == Transposed(RowBlocks(Spectral(), 3))
    assert found["transformer.h.0.mlp.c_fc.weight"] == Transposed(Spectral())
    own = task_of("encoder", data)
    found = norms(from_torch(own.model, first_batch(own)[0]))
    assert found["encoder.layers.0.self_attn.in_proj_weight"] == RowBlocks(Spectral(), 3)
    assert found["encoder.layers.0.linear1.weight"] == Spectral()
    assert found["head.weight"] == RowNorm.into_logits(32)
    assert found["head.bias"] == Sign()


def test_gates_of_a_recurrent_cell_count_one_by_one(data) -> None:
    task = task_of("lstm", data)
    found = norms(from_torch(task.model, first_batch(task)[0]))
    assert found["lstm.weight_hh_l0"] == RowBlocks(Spectral(), 4)


def test_a_tied_head_is_one_weight_with_two_uses(data) -> None:
    task = task_of("gpt2", data)
    network = from_torch(task.model, first_batch(task)[0])
    assert "lm_head.weight" not in network.weights()
    width = 32
    # from one-hot to RMS, and from RMS to the largest score: the norms differ by a factor of the width
    assert sorted(network.ratios.values())[-1] == pytest.approx(width)


class Plain(nn.Module):
    """A chain of linear maps."""

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


SLACK = 1.001
"""Rounding of what is measured."""


@pytest.mark.parametrize("depth", [1, 4])
def test_a_chain_of_orthogonal_maps_has_its_length_for_depth(depth: int) -> None:
    network = from_torch(Plain(depth), torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), scores=False)
    bound = network.bound(0.3)
    assert depth / SLACK <= float(bound.depth) <= SLACK * depth
    assert (1 + 0.3 / SLACK) ** depth <= float(bound.growth) <= (1 + 0.3 * SLACK) ** depth


def test_a_residual_network_has_the_depth_of_one_block() -> None:
    class Residual(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Plain(2) for _ in range(blocks))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x) / len(self.blocks)
            return x

    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    depths = [float(from_torch(Residual(blocks), x, scores=False).bound().depth) for blocks in (4, 32)]
    # of one block, which has two layers, however many there are
    assert depths[0] < depths[1] <= 2 * SLACK


@pytest.mark.parametrize(
    "norm",
    [
        Spectral(),
        RowBlocks(Spectral(), 2),
        Transposed(Spectral()),
        Transposed(RowBlocks(Spectral(), 3)),
        RowNorm(2.0),
        Sign(),
    ],
    ids=str,
)
def test_a_size_is_measured_within_some_per_cent(norm: Any) -> None:
    weight = torch.randn(48, 60, generator=torch.Generator().manual_seed(0))
    assert size_of(norm, weight) == pytest.approx(float(norm.size(weight)), rel=0.02)


@pytest.mark.parametrize(
    "layer",
    [
        Conv2d(32, 16, 3, geometry="taps"),
        Conv2d(32, 16, 3, geometry="patch"),
        Conv2d(32, 16, (2, 3), groups=4, stride=2, dilation=2, geometry="patch"),
        # patches of 4, 2, 2 and 1 taps, each with a factor of its own
        ConvTranspose2d(16, 8, 3, stride=2, geometry="patch"),
        ConvTranspose2d(16, 8, (3, 5), stride=(2, 1), dilation=2, groups=2, geometry="patch"),
        ConvTranspose1d(16, 8, 3, stride=2, geometry="taps"),
        ConvTranspose3d(8, 4, 3, stride=2, geometry="patch"),
    ],
    ids=str,
)
def test_a_kernel_is_measured_too(layer: Any) -> None:
    for seed in range(8):
        kernel = torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed))
        assert size_of(layer.norm, kernel) == pytest.approx(float(layer.norm.size(kernel)), rel=0.02)


@pytest.mark.parametrize(("layer", "shape"), [("Conv1d", (9,)), ("Conv2d", (9, 9)), ("ConvTranspose2d", (9, 9))])
def test_a_kernel_moves_as_one_matrix(layer: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(getattr(nn, layer)(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    inputs = torch.randn(8, 4, *shape)
    model(inputs)
    kernel = from_torch(model, inputs).weights()["0.weight"]
    assert isinstance(kernel.norm, Unfolded)
    assert kernel.size == pytest.approx(float(kernel.norm.size(model[0].weight.detach())), rel=0.02)


@pytest.mark.parametrize("factor", [1e-3, 0.5, 0.8, 30.0])
def test_small_scores_count_as_one_but_may_be_found_as_flat_as_they_are(factor: float) -> None:
    model, inputs = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5, bias=False)), torch.randn(64, 16)
    with torch.no_grad():
        peak = float(model(inputs).abs().amax(1).mean())
        model[2].weight *= factor / peak
    network = from_torch(model, inputs)
    assert float(network.bound().magnitude) == pytest.approx(max(factor, 1.0), rel=0.01)
    assert network.curvature_slack == pytest.approx(min(max(factor, 0.3), 1.0) ** 2, rel=0.02)
    assert from_torch(model, inputs, scores=False).curvature_slack == 1
    # what the least curvature is multiplied with
    method = agd(network, CrossEntropy())
    zero = torch.zeros((), dtype=torch.float64)
    state = method.init(network.parameters())._replace(
        expected=zero + 1, smoothed=zero + 1, scale=zero + 1, weight=zero + 1
    )
    assert float(method.measured_curvature(state)) == pytest.approx(network.curvature_slack / 8)


def test_sizes_are_those_of_the_weights_as_they_come() -> None:
    model = Plain(2)
    with torch.no_grad():
        model.layers[0].weight.mul_(3.0)
    network = from_torch(model, torch.randn(8, 16), scores=False)
    sizes = [weight.size for weight in network.weights().values()]
    assert sizes == pytest.approx([3.0, 1.0], rel=1e-3)
    # a step is relative to them
    method = agd(network, SquareLoss(), momentum=None)
    params = network.parameters()
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    updates, state = method.update(grads, method.init(params), params)
    moved = [float(torch.linalg.matrix_norm(update, ord=2)) for update in updates.values()]
    assert moved == pytest.approx([size * float(state.t) for size in sizes], rel=1e-2)


def test_a_frozen_weight_stays_and_costs_nothing() -> None:
    model = Plain(3)
    model.layers[1].weight.requires_grad_(False)
    network = from_torch(model, torch.randn(8, 16), scores=False)
    assert [weight.mass for weight in network.weights().values()] == [1.0, 0.0, 1.0]
    assert float(network.bound().depth) == pytest.approx(2, rel=1e-3)


def test_low_rank_adapters_are_all_that_moves(data) -> None:
    peft = pytest.importorskip("peft")
    task = task_of("gpt2", data)
    settings = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(task.model, settings)
    network = from_torch(adapted, first_batch(task)[0])
    moving = {name for name, weight in network.weights().items() if weight.mass > 0}
    assert moving == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in moving)
    losses = trained(models.Task(adapted, task.loss, task.batch), network, 30)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_model_in_evaluation_is_captured_as_in_training_and_left_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    mean = model[1].running_mean.clone()
    state = torch.random.get_rng_state()
    network = from_torch(model, torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) + 5)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert any(node.operator == "dropout" for node in network.graph.nodes.values())


def test_training_renews_running_statistics_and_evaluation_takes_them() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = torch.randn(16, 8) + 3
    network = from_torch(model, x)
    params = network.parameters()
    _, renewed = network.run(params, x, network.buffers())
    assert not torch.equal(renewed["1.running_mean"], model[1].running_mean)
    outputs = network(params, x, renewed)
    assert not torch.allclose(outputs, network(params, x))
    assert torch.equal(model[1].running_mean, torch.zeros(8))


def test_objective_and_initial_weights_as_of_any_network() -> None:
    network = from_torch(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(4, 8))
    params = network.init(0)
    assert params.keys() == network.weights().keys()
    method = agd(network, CrossEntropy())
    assert network.codomain == Logits(3)
    grads, value = torch.func.grad_and_value(method.objective)(params, torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    updates, _ = method.update(grads, method.init(params), params)
    assert float(value) > 0
    assert updates.keys() == params.keys()


def test_masses_freeze_a_part() -> None:
    network = from_torch(Plain(3), torch.randn(8, 16), scores=False)
    assert float(network.with_masses({"layers.0.weight": 0.0}).bound().depth) == pytest.approx(2, rel=1e-3)


# -- what is not known ---------------------------------------------------------------------------------------------------


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), Bessel())
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j1(x)


def test_an_unknown_operator_is_named_with_its_line_and_can_be_declared() -> None:
    x = torch.randn(8, 8)
    with pytest.raises(UnknownBound) as caught:
        from_torch(Strange(), x)
    for fact in ("special_bessel_j1", "Bessel", "'inner.1'", "torch.special.bessel_j1(x)", "declare("):
        assert fact in str(caught.value)
    declare(torch.ops.aten.special_bessel_j1.default, lipschitz=0.5, source="the largest slope is that at 0")
    try:
        network = from_torch(Strange(), x)
        assert "the largest slope is that at 0" in str(network)
        assert float(network.bound().depth) > 0
    finally:
        undeclare("special_bessel_j1")
    with pytest.raises(UnknownBound):
        from_torch(Strange(), x)


def test_a_rule_can_be_declared() -> None:
    seen = []

    def rule(call):
        seen.append(call.name)
        return call.settled(call.bound(call.argument(0)))

    declare("special_bessel_j1", rule=rule)
    try:
        from_torch(Strange(), torch.randn(8, 8))
    finally:
        undeclare(torch.ops.aten.special_bessel_j1)
    assert seen
    assert set(seen) == {"special_bessel_j1"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "either lipschitz"),
        ({"lipschitz": 1.0}, "no source"),
        ({"lipschitz": -1.0, "source": "x"}, "finite number > 0"),
        ({"rule": 3}, "cannot be called"),
    ],
)
def test_a_declaration_without_ground_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        declare("special_bessel_j1", **options)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return {"count": 3, "scores": self.layer(x)}


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: from_torch("model", torch.randn(2, 8)), InvalidArgument, "no torch.nn.Module"),
        (lambda: from_torch(nn.Linear(8, 3), torch.randn(2, 7)), InvalidArgument, "failed: RuntimeError"),
        (lambda: from_torch(Branching(), torch.randn(2, 8)), InvalidArgument, "torch.where"),
        (lambda: from_torch(Several(), torch.randn(2, 8), output="logits"), SpaceMismatch, "output="),
        (lambda: from_torch(nn.ReLU(), torch.randn(2, 8)), InvalidArgument, "no parameter"),
        (
            lambda: from_torch(nn.Linear(8, 3).requires_grad_(False), torch.randn(2, 8)),
            InvalidArgument,
            "requires a gradient",
        ),
    ],
)
def test_what_cannot_be_captured_is_told(make, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_an_output_is_found_by_name_position_or_function() -> None:
    x = torch.randn(2, 8)
    for choice in (None, "scores", lambda outputs: outputs["scores"]):
        assert from_torch(Several(), x, output=choice).codomain == Logits(3)


def test_a_certified_step_is_refused() -> None:
    with pytest.raises(UnknownBound):
        agd(from_torch(Plain(2), torch.randn(8, 16), scores=False), SquareLoss(), search=Certified())


def test_an_example_that_holds_no_numbers_is_refused() -> None:
    for x in (torch.full((4, 8), torch.nan), torch.empty(0, 8), torch.randn(4, 8, device="meta")):
        with pytest.raises(InvalidArgument, match=r"NaN|meta"):
            from_torch(nn.Linear(8, 3), x)
