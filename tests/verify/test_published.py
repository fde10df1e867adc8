"""Published statements that need more than they say: the cases in which they fail as printed, and what is true instead."""

import torch

from modula_agd import MLP, Conv2d, Features, Image, Linear, ReLU, SquareLoss, agd, one_hot, published
from modula_agd.verify import ModuleDraw, Objective
from modula_agd.verify.descent_laws import BoundedObjective, ExactMajorisation


def test_majorisation_without_the_model_term_fails_for_some_relu_networks():
    """AGD paper, Theorem 1 rests on Assumption 1 (orthogonality). Random small networks at AGD's own initialisation and step."""
    failures = rises = 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        network = Linear(2, 3) @ ReLU() @ Linear(3, 3) @ ReLU() @ Linear(3, 2)
        method = published(network, SquareLoss())
        params = network.init(generator, dtype=torch.float64)
        inputs = torch.randn(4, 2, generator=generator, dtype=torch.float64)
        inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt()
        targets = one_hot(torch.randint(2, (4,), generator=generator), 2).double()
        gradients, before = torch.func.grad_and_value(method.objective)(params, inputs, targets)
        updates, state = method.update(gradients, method.init(params), params)
        moved = {name: w + updates[name] for name, w in params.items()}
        after = method.objective(moved, inputs, targets)
        failures += bool(after > before + state.change + 1e-12)
        rises += bool(after > before)
    assert failures > 0, "no counterexample to the majorisation without its model term"
    assert rises == 0, "a step of AGD raised the loss; theory.md says that none of 24,752 did"


def test_with_the_model_term_the_same_networks_obey():
    network = Linear(2, 3) @ ReLU() @ Linear(3, 3) @ ReLU() @ Linear(3, 2)
    for seed in range(100):
        draw = ModuleDraw(seed=seed, weights="orthogonal", steps="gaussian", t=0.2, batch=3)
        assert ExactMajorisation()(Objective(network, SquareLoss()), draw).holds()


def test_the_bounded_objectives_constant_is_two():
    """The paper's Lemma bounds the square loss by 1 for outputs and targets of RMS 1; f = −y reaches 2."""
    outputs = torch.ones(1, 3, dtype=torch.float64)
    assert SquareLoss()(outputs, -outputs) == 2.0
    measurement = BoundedObjective()(
        Objective(Linear(3, 3), SquareLoss()), ModuleDraw(weights="ones", inputs="constant", t=0.0)
    )
    assert measurement.ratio >= 0.99


def test_a_convolutions_worst_gain_is_k_times_what_the_published_norm_says():
    """All taps one orthogonal matrix: in the norm with sqrt(k_h·k_w) = k that kernel has size 1, its gain is k."""
    k, channels = 3, 4
    conv = Conv2d(channels, channels, k, padding=1)
    tap = conv.init(0, dtype=torch.float64)["weight"][:, :, :1, :1]
    kernel = tap.expand(-1, -1, k, k).contiguous()
    assert torch.isclose(conv.norm.size(kernel), torch.tensor(1.0, dtype=torch.float64))
    constant = torch.ones(1, channels, 5, 5, dtype=torch.float64)
    space = Image(channels)
    gain = space.norm(conv({"weight": kernel}, constant)) / space.norm(constant)
    assert torch.isclose(gain, torch.tensor([float(k)], dtype=torch.float64))
    assert conv.gain.proved.value == k
    assert conv.gain.typical.value == 1.0


def test_steps_with_prescribed_sizes_can_raise_the_loss_where_weights_have_drifted():
    """Prescribed sizes assume that norms stay; on weights ten times as large, a step overshoots. Tracked sizes do not."""
    network = Linear(2, 3) @ Linear(3, 2)
    params = {name: 10 * w for name, w in network.init(0, dtype=torch.float64).items()}
    inputs = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    targets = network(params, inputs) * 1.01
    outcomes = {}
    for sizes in ("prescribed", "tracked"):
        method = agd(network, SquareLoss(), sizes=sizes)
        gradients, before = torch.func.grad_and_value(method.objective)(params, inputs, targets)
        updates, _ = method.update(gradients, method.init(params), params)
        outcomes[sizes] = method.objective({n: w + updates[n] for n, w in params.items()}, inputs, targets) > before
    assert outcomes == {"prescribed": True, "tracked": False}


def test_depth_counted_in_tensors_is_what_the_code_counts_and_theory_corrects():
    network = MLP(3, 4, 5, depth=4)
    assert published(network, SquareLoss()).search.depth == 4  # pyright: ignore
    assert network.bound().ceiling == 4
    assert isinstance(network.domain, Features)
