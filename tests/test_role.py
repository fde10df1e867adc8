"""What a parameter is to a decay: which fade at all."""

import copy

import pytest
import torch

from modula_agd import (
    AGD,
    GPT,
    CrossEntropy,
    Embedding,
    Fading,
    Linear,
    Logits,
    SquareLoss,
    Tanh,
    Unembedding,
    agd,
    explain,
    from_torch,
)
from modula_agd.norm import RowNorm, Transposed
from support import gaussian


def faded(model, loss, inputs, targets, decay) -> set[str]:
    """The parameters that a step of a captured model takes from."""
    mine = copy.deepcopy(model)
    optimizer = AGD(mine, loss, example_inputs=inputs, decay=decay)
    optimizer.method.loss(mine(inputs), targets).backward()
    optimizer.step()
    return {share.name for share in optimizer.explain().shares if share.decayed}


def faded_of(net, loss, inputs, targets, **options) -> set[str]:
    """The parameters of a network that a step takes from."""
    method = agd(net, loss, decay=Fading(), **options)
    params = net.init(0, dtype=torch.float64)
    grads = torch.func.grad(method.objective)(params, inputs, targets)
    _, state = method.update(grads, method.init(params), params)
    return {share.name for share in explain(method, state).shares if share.decayed}


def test_biases_and_gains_and_what_makes_logits_do_not_fade() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    inputs, labels = torch.randn(16, 6), torch.arange(16) % 3
    everything = {name for name, _ in model.named_parameters()}
    assert faded(model, CrossEntropy(), inputs, labels, Fading()) == {"0.weight"}
    assert faded(model, CrossEntropy(), inputs, labels, 0.1) == everything
    # to a square loss outputs are features
    assert faded(model, SquareLoss(), inputs, torch.randn(16, 3), Fading()) == {"0.weight", "3.weight"}


@pytest.mark.parametrize(
    "options", [{}, {"constants": "proved"}, {"rows": "declared"}, {"direction": "frobenius"}], ids=str
)
def test_what_makes_logits_does_not_fade_whatever_its_rows_go_by(options) -> None:
    net = Linear(Logits(3), 6) @ Tanh() @ Linear(6, 4)
    assert faded_of(net, CrossEntropy(), gaussian(8, 4), torch.arange(8) % 3, **options) == {"0.weight"}


def test_what_makes_logits_is_told_by_its_space_and_by_the_loss() -> None:
    one = Linear(Logits(3), 1) @ Linear(1, 4)
    assert faded_of(one, CrossEntropy(), gaussian(8, 4), torch.arange(8) % 3) == {"0.weight"}
    scores = Linear(Logits(3), 6) @ Linear(6, 4)
    assert faded_of(scores, SquareLoss(), gaussian(8, 4), gaussian(8, 3)) == {"0.weight", "1.weight"}
    tokens, targets = torch.arange(8).reshape(2, 4) % 5, torch.arange(8).reshape(2, 4) % 5
    untied = Unembedding(5, 6) @ Embedding(6, 5)
    assert faded_of(untied, CrossEntropy(), tokens, targets) == {"0.weight"}
    tied = GPT(5, 8, 2, 1, 4, tied=True)
    assert "embedding.weight" in faded_of(tied, CrossEntropy(), tokens, targets)


def test_a_vector_of_each_head_is_a_vector() -> None:
    net = GPT(5, 8, 2, 1, 4, bias=True, affine=True)
    tokens = torch.arange(8).reshape(2, 4) % 5
    faded_ones = faded_of(net, CrossEntropy(), tokens, tokens)
    kinds = {name: type(atom).__name__ for name, atom in net.weights().items()}
    assert {kinds[name] for name in faded_ones} == {"Embedding", "Positions", "QKV", "Linear"}
    assert any(len(net.weights()[name].shape) == 2 for name, kind in kinds.items() if kind == "Bias")


def test_a_gain_of_channels_is_a_vector_in_a_captured_model_too() -> None:
    class Channels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.gain = torch.nn.Conv2d(3, 8, 3), torch.nn.Parameter(torch.ones(8, 1, 1))
            self.head = torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.gain * self.kernel(x)).relu().mean((2, 3)))

    torch.manual_seed(0)
    inputs, labels = torch.randn(6, 3, 5, 5), torch.arange(6) % 4
    assert faded(Channels(), CrossEntropy(), inputs, labels, Fading()) == {"kernel.weight"}


class Headed(torch.nn.Module):
    """A body of one layer, and what makes scores of it."""

    def __init__(self, shape: tuple[int, ...], scores) -> None:
        super().__init__()
        self.hidden, self.head = torch.nn.Linear(6, 8, bias=False), torch.nn.Parameter(torch.randn(shape) / 8)
        self.scale, self.scores = torch.nn.Parameter(torch.tensor(2.0)), scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self, self.hidden(x).relu())


LINEAR = torch.nn.functional.linear


@pytest.mark.parametrize(
    ("shape", "scores"),
    [
        ((3, 8), lambda m, h: LINEAR(h, m.head)),
        ((8, 3), lambda m, h: h @ m.head),
        ((3, 8), lambda m, h: torch.einsum("bi,oi->bo", h, m.head)),
        ((8, 3), lambda m, h: torch.einsum("bi,io->bo", h, m.head)),
        ((3, 8), lambda m, h: 30 * torch.tanh(LINEAR(h, m.head) / 30)),
        ((3, 8), lambda m, h: LINEAR(h, m.head).clamp(-30, 30)),
        ((3, 8), lambda m, h: m.scale.exp() * LINEAR(h, m.head)),
        ((3, 8), lambda m, h: LINEAR(h, m.head) * h.mean(-1, keepdim=True).sigmoid()),
        ((3, 8), lambda m, h: h[:, :3].sigmoid() * LINEAR(h, m.head)),
        ((3, 8), lambda m, h: LINEAR(h[:, None].expand(-1, 5, -1), m.head)[torch.arange(len(h)), -1]),
        ((3, 8), lambda m, h: LINEAR(h[:, None].expand(-1, 5, -1), m.head).index_select(1, torch.tensor([4]))[:, 0]),
        ((3, 8, 1), lambda m, h: torch.nn.functional.conv1d(h[:, :, None], m.head)[..., 0]),
        ((3, 8), lambda m, h: torch.einsum("...i,oi->...o", h, m.head)),
        ((3, 8), lambda m, h: torch.einsum("bi,oi", h, m.head)),
        ((3, 8), lambda m, h: torch.einsum("bi,io->bo", h, m.head.t())),
        ((2, 8, 3), lambda m, h: torch.einsum("bi,eio->ebo", h, m.head).mean(0)),
        ((2, 3, 4), lambda m, h: torch.einsum("bhi,hoi->bo", h.unflatten(1, (2, 4)), m.head)),
        ((8, 3), lambda m, h: (h[None] @ m.head.unsqueeze(0))[0]),
        ((24,), lambda m, h: torch.einsum("bi,io->bo", h, m.head.view(8, 3))),
        ((96,), lambda m, h: (h[None] @ m.head.view(4, 8, 3)).mean(0)),
        ((3, 8), lambda m, h: torch.where(h[:, :3] > 9, -1e9, LINEAR(h, m.head))),
        ((3, 8), lambda m, h: LINEAR(h, m.head) - LINEAR(h, m.head).mean(1, keepdim=True)),
        ((2, 8), lambda m, h: torch.cat([LINEAR(h, m.head), torch.zeros(len(h), 1)], 1)),
        ((3, 8), lambda m, h: m.scale.expand(len(h), 3) * LINEAR(h, m.head)),
    ],
    ids=[
        "linear",
        "from the right",
        "einsum",
        "einsum from the right",
        "soft cap",
        "clamp",
        "temperature",
        "gate behind",
        "gate before",
        "last token",
        "chosen token",
        "convolution",
        "ellipsis",
        "implicit result",
        "einsum of the transpose",
        "several",
        "heads",
        "stacked",
        "laid out flat",
        "several laid out flat",
        "mask",
        "centred",
        "side by side",
        "temperature repeated",
    ],
)
def test_what_makes_scores_is_found_behind_what_only_turns_or_caps_them(shape, scores) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(16, 6), torch.arange(16) % 3
    assert faded(Headed(shape, scores), CrossEntropy(), inputs, labels, Fading()) == {"hidden.weight"}


@pytest.mark.parametrize(
    ("shape", "scores"),
    [
        ((3, 8), lambda m, h: LINEAR(h, m.head).relu()),
        ((3, 8), lambda m, h: LINEAR(h, m.head) * h[:, :3] @ torch.eye(3)),
        ((3, 3), lambda m, h: torch.einsum("bi,ij,jo->bo", h[:, :3], m.head, torch.ones(3, 3))),
        ((2, 4), lambda m, h: torch.einsum("bti,ts->bsi", h[:, :6].unflatten(1, (2, 3)), m.head).mean(1)),
    ],
    ids=["rectifier", "product", "inner factor", "mixed positions"],
)
def test_what_makes_features_is_no_head(shape, scores) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(16, 6), torch.arange(16) % 3
    assert "head" in faded(Headed(shape, scores), CrossEntropy(), inputs, labels, Fading())


@pytest.mark.parametrize(
    ("shape", "scores", "norm"),
    [
        ((3, 8), lambda m, h: torch.einsum("...i,oi->...o", h, m.head), RowNorm.into_logits(8)),
        ((8, 3), lambda m, h: torch.einsum("bi,io", h, m.head), Transposed(RowNorm.into_logits(8))),
        ((3, 8), lambda m, h: torch.einsum("bi,io->bo", h, m.head.t()), RowNorm.into_logits(8)),
        ((8, 3), lambda m, h: (h[None] @ m.head.unsqueeze(0))[0], Transposed(RowNorm.into_logits(8))),
        ((3, 8), lambda m, h: 9 * torch.tanh(LINEAR(h, m.head) / 9), RowNorm.into_logits(8)),
    ],
)
def test_a_head_goes_by_its_rows_however_it_is_written(shape, scores, norm) -> None:
    torch.manual_seed(0)
    weight = from_torch(Headed(shape, scores), torch.randn(16, 6)).weights()["head"]
    assert (weight.norm, repr(weight)) == (norm, "Linear(Logits(3), 8)")


@pytest.mark.parametrize("scores", [lambda z: z / 30, lambda z: 30 * torch.tanh(z / 30)], ids=["quotient", "soft cap"])
def test_a_head_of_zeros_learns_behind_a_quotient(scores) -> None:
    torch.manual_seed(0)
    model = Headed((3, 8), lambda m, h: scores(LINEAR(h, m.head)))
    torch.nn.init.zeros_(model.head)
    inputs, labels = torch.randn(64, 6), torch.arange(64) % 3
    inputs[:, :3] += 3 * torch.nn.functional.one_hot(labels, 3)
    assert from_torch(model, inputs).bound().magnitude < 2
    optimizer = AGD(model, CrossEntropy(), example_inputs=inputs)
    for _ in range(100):
        loss = CrossEntropy()(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


def test_a_token_that_is_repeated_does_not_fade_and_a_table_of_one_feature_does() -> None:
    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.table = torch.nn.Parameter(torch.randn(1, 1, 8)), torch.nn.Parameter(torch.randn(7, 1))
            self.mix, self.head = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.table[torch.arange(4)].repeat(1, 8)
            return self.head(self.mix(rows).relu().mean(1))

    torch.manual_seed(0)
    inputs, labels = torch.randn(12, 3, 8), torch.arange(12) % 3
    assert faded(Tokens(), CrossEntropy(), inputs, labels, Fading()) == {"mix.weight", "table"}
