"""Devices: which are usable, how precisely each can compute, and what each draws from."""

import torch

from modula_agd.error import InvalidArgument


def precise(device: torch.device) -> torch.dtype:
    """The dtype of the scalars that steer a step: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def exact(device: torch.device) -> torch.autocast:
    """A context in which autocast leaves products as precise as their operands are."""
    return torch.autocast(device.type, enabled=False)


def own_generator(device: torch.device) -> torch.Generator | None:
    """The generator that torch's functions draw from on a device; None where it shows none."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return None


def usable(name: str | torch.device) -> torch.device:
    """The device of that name, after trying it.

    Raises:
        InvalidArgument: there is none, or torch was built without it.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # What torch raises for an unknown name, a backend it was built without, and one without a driver.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InvalidArgument(f"the device {str(name)!r} cannot be used: {reason}. Try cpu.") from error
    return device
