"""How far TF32 and bfloat16 products carry the laws on an accelerator, measured. `pytest -m gpu tests/verify`."""

import pytest
import torch

from modula_agd import MLP, Linear
from modula_agd.polar import polar
from modula_agd.verify import Device, Growth, Magnitude, ModuleDraw

pytestmark = pytest.mark.gpu


@pytest.fixture
def tf32():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def _excess(law, network, where: Device) -> float:
    """Worst of (lhs − rhs)/rhs over draws that attain the law in exact arithmetic."""
    worst = 0.0
    for seed in range(50):
        for weights in ("orthogonal", "ones"):
            draw = ModuleDraw(seed=seed, weights=weights, inputs="constant" if weights == "ones" else "gaussian", t=0.5)
            lhs, rhs, _ = law(network, draw, where)
            worst = max(worst, float((lhs - rhs) / rhs))
    return worst


@pytest.mark.parametrize("law", [Magnitude(), Growth()], ids=lambda law: law.name)
@pytest.mark.parametrize("network", [Linear(64, 64), MLP(64, 64, 64, depth=4)], ids=["Linear", "MLP"])
def test_tf32_exceeds_a_law_by_a_few_of_its_roundings_at_most(tf32, law, network, record_property) -> None:
    excess = _excess(law, network, Device(torch.device("cuda"), torch.float32))
    record_property("excess", excess)
    # TF32 has 10 bits of mantissa: 2^-11 for each of the four layers' operands, both of them
    assert excess <= 8 * 2.0**-11


def test_the_polar_factor_under_tf32_stays_within_norm_one(tf32, record_property) -> None:
    worst = 0.0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(128, 256, generator=generator).cuda()
        worst = max(worst, float(torch.linalg.svdvals(polar(x).double()).max()))
    record_property("largest singular value", worst)
    assert worst <= 1 + 2.0**-8
