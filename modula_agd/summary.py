"""The table that ``print(network)`` shows: what each atom declares, and what the whole network's bound comes to."""

from collections.abc import Sequence
from typing import NamedTuple

from modula_agd.bound import Bound, aligned


class Row(NamedTuple):
    """One atom: texts as they are printed, and its mass."""

    name: str
    module: str
    shape: tuple[int, ...]
    norm: str
    mass: float


def summary(rows: Sequence[Row], bound: Bound, proved: Bound | None) -> str:
    """One line per atom, then the bound of the whole.

    Args:
        rows: the atoms in order of application.
        bound: the network's bound at t = 0.
        proved: the same by proved constants, which a certified step takes; None where a layer has none.

    Returns:
        A table; its last column is m/D, the part of η by which a step of ``ExactGrowth`` (the default) moves that atom, relative
        to its size, before anything that is measured counts in.
    """
    header = ("parameter", "module", "shape", "norm", "mass", "share of η")
    depth = float(bound.depth)
    body = [
        (
            r.name,
            r.module,
            "×".join(map(str, r.shape)),
            r.norm,
            f"{r.mass:g}",
            f"{r.mass / depth:.4f}" if depth else "0",
        )
        for r in rows
    ]
    table = columns(header, body)
    if proved is None or proved.error is None:
        order = "not bounded: certified steps are unavailable"
    elif bound.error is None:
        order = f"bounded by the proved constants alone, at depth {float(proved.depth):.3g}"
    else:
        order = "bounded"
    facts = bound.facts()
    facts.insert(3, ("second order", order))
    return "\n".join([*table, table[1], aligned(facts)])


def columns(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for people: the header, a rule, and the rows, in columns as wide as they need."""
    widths = [max(len(line[column]) for line in (header, *body)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *body)
    ]
    lines.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines
