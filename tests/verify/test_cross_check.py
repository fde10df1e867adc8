"""An independent check of growth: the exact supremum for ReLU networks on two inputs, by enumerating activation patterns.

Nothing of the library's forward pass or bounds is used for the exact value. A bias-free ReLU network is positively
homogeneous, so over two inputs its linear pieces are sectors of the plane. Sectors are split wherever a neuron of either
network (before or after the step) changes sign; on each, the difference of the outputs is one matrix, whose largest gain
over the sector's angles has a closed form.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from modula_agd import Linear, ReLU
from modula_agd.verify import Growth, ModuleDraw
from modula_agd.verify.law import Device
from modula_agd.verify.module_laws import Case


def _split(sectors, layer_input):
    """Split each sector at the angles where a row of its matrix changes sign."""
    for low, high, matrices in sectors:
        cuts = {low, high}
        for rows in layer_input(matrices):
            for a, b in rows:
                zero = math.atan2(-a, b)  # a·cos θ + b·sin θ = 0
                for turn in range(-3, 4):
                    angle = zero + turn * math.pi
                    if low < angle < high:
                        cuts.add(angle)
        ordered = sorted(cuts)
        for left, right in pairwise(ordered):
            yield left, right, matrices


def exact_supremum(before, after):
    """max over ‖x‖_RMS ≤ 1 of RMS(f_after(x) − f_before(x)), for lists of weight matrices with ReLU between."""
    sectors = [(0.0, 2 * math.pi, (np.eye(2), np.eye(2)))]
    for depth, pair in enumerate(zip(before, after, strict=True)):
        last = depth == len(before) - 1
        grown = [(low, high, tuple(w @ m for w, m in zip(pair, ms, strict=True))) for low, high, ms in sectors]
        if last:
            sectors = grown
            break
        sectors = []
        for low, high, ms in _split(grown, lambda ms: ms):
            middle = np.array([math.cos((low + high) / 2), math.sin((low + high) / 2)])
            sectors.append((low, high, tuple(m * (m @ middle > 0)[:, None] for m in ms)))
    best = 0.0
    for low, high, (m, n) in sectors:
        gram = (n - m).T @ (n - m)
        # x = (cos θ, sin θ): xᵀ gram x = c + r·cos(2θ − φ)
        c, r = (gram[0, 0] + gram[1, 1]) / 2, math.hypot((gram[0, 0] - gram[1, 1]) / 2, gram[0, 1])
        peak = math.atan2(gram[0, 1], (gram[0, 0] - gram[1, 1]) / 2) / 2
        angles = [low, high, *(peak + turn * math.pi for turn in range(-2, 5) if low < peak + turn * math.pi < high)]
        best = max(best, *(c + r * math.cos(2 * (angle - peak)) for angle in angles))
    # ‖x‖_RMS = 1 means ‖x‖₂ = sqrt(2); outputs are measured in RMS
    return math.sqrt(2 * max(best, 0.0) / before[-1].shape[0])


def _case(seed, t):
    depth = 2 + seed % 3
    width = 2 + seed % 4
    network = Linear(2, width)
    for _ in range(depth - 2):
        network = network @ ReLU() @ Linear(width, width)
    network = network @ ReLU() @ Linear(width, 2)
    weights = ("orthogonal", "gaussian", "ones", "spread")[seed % 4]
    steps = ("along", "gaussian", "orthogonal")[seed % 3]
    draw = ModuleDraw(seed=seed, weights=weights, steps=steps, t=t, batch=3)
    case = Case(network, draw, Growth().tensors(network, draw), Device())
    before = [w.numpy() for w in case.params.values()]
    after = [w.numpy() for w in case.moved.values()]
    return network, draw, case, before, after


@pytest.mark.slow
@pytest.mark.parametrize("t", [1e-3, 0.1, 1.0])
def test_growth_bounds_the_exact_supremum_of_small_relu_networks(t):
    tightest = 0.0
    for seed in range(300):
        _, _, case, before, after = _case(seed, t)
        exact = exact_supremum(before, after)
        bound = case.bound(t)
        declared = bound.magnitude * (bound.growth - 1)
        assert exact <= declared * (1 + 1e-9)
        tightest = max(tightest, exact / declared)
    assert tightest > 0.99  # some network attains it


@pytest.mark.slow
def test_the_enumeration_is_an_upper_bound_of_sampling_and_nearly_reached_by_it():
    for seed in range(60):
        network, _, case, before, after = _case(seed, 0.3)
        angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
        inputs = math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], dim=1)
        change = network(case.moved, inputs) - network(case.params, inputs)
        sampled = change.square().mean(1).sqrt().max().item()
        exact = exact_supremum(before, after)
        assert sampled <= exact * (1 + 1e-9)
        assert sampled >= exact * (1 - 1e-3)
