"""Independent streams of randomness from the one seed of a run."""

import torch

# The weights and the shuffles both start from the seed itself; what came later has a stream of its own, so that switching
# it on changes neither.
AUGMENTATION, DROPOUT = 1, 2

# 2⁶⁴ over the golden ratio: multiples of it spread evenly over 64 bits (Knuth, The Art of Computer Programming, 6.4).
_SPREAD = 0x9E3779B97F4A7C15


def stream(seed: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is the same for equal arguments.

    Args:
        seed: of the run, from 0 to 2⁶³ − 1.
        number: which stream, ≥ 0; 0 starts from the seed itself.
        device: where the generator draws.
    """
    return torch.Generator(device).manual_seed((seed + number * _SPREAD) % 2**63)
