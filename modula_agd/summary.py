"""The table that ``print(network)`` shows: what each atom declares, and what the whole network's bound comes to."""

from collections.abc import Sequence
from typing import NamedTuple

from modula_agd.bound import Bound


class Row(NamedTuple):
    """One atom: texts as they are printed, and its mass."""

    name: str
    module: str
    shape: tuple[int, ...]
    norm: str
    mass: float


def summary(rows: Sequence[Row], bound: Bound) -> str:
    """One line per atom, then the bound of the whole.

    Args:
        rows: the atoms in order of application.
        bound: the network's bound at t = 0.

    Returns:
        A table; its last column is m/D̄, the part of η by which a closed-form step moves that atom, relative to its size.
    """
    header = ("parameter", "module", "shape", "norm", "mass", "share of η")
    ceiling = float(bound.ceiling)
    body = [
        (
            r.name,
            r.module,
            "×".join(map(str, r.shape)),
            r.norm,
            f"{r.mass:g}",
            f"{r.mass / ceiling:.4f}" if ceiling else "0",
        )
        for r in rows
    ]
    widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *body)
    ]
    lines.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    facts = [
        ("depth D", f"{float(bound.depth):.6g}"),
        ("ceiling depth D̄", f"{float(bound.ceiling):.6g}"),
        ("output magnitude a", f"{float(bound.magnitude):.6g}"),
        ("second order", "bounded" if bound.error is not None else "not bounded: certified steps are unavailable"),
        ("grade", str(bound.grade)),
        *(("rests on", assumption) for assumption in bound.assumptions),
    ]
    return "\n".join([*lines, lines[1], *(f"{name:<20}{value}" for name, value in facts)])
