"""``check``: point the laws at any module, norm or loss, and get a table of what was tried and what broke."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, target
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from modula_agd.atom import Linear
from modula_agd.bound import Grade
from modula_agd.device import usable
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.loss import Loss
from modula_agd.module import Module
from modula_agd.space import Features, Image, Logits, Space, Tuple, Volume, positive
from modula_agd.space import Sequence as SequenceSpace
from modula_agd.verify.descent_laws import DESCENT_LAWS, Objective
from modula_agd.verify.law import Device, Law, Measurement
from modula_agd.verify.loss_laws import LOSS_LAWS
from modula_agd.verify.module_laws import MODULE_LAWS
from modula_agd.verify.norm_laws import NORM_LAWS, Shaped
from modula_agd.verify.strategies import loss_draws, module_draws, norm_draws


@dataclass(frozen=True)
class Finding:
    """What came of one law on one subject.

    Args:
        law: its name.
        statement: its formula.
        grade: how well the claim is founded, if it holds.
        subject: what it was tried on.
        cases: number of cases tried.
        worst: largest lhs/rhs met; 1 where the law is attained, above 1 where it is broken.
        example: the smallest case found that breaks it, as code that reproduces it; None where the law held.
        raised: whether that case raised an error, so that nothing was measured.
    """

    law: str
    statement: str
    grade: Grade
    subject: str
    cases: int
    worst: float
    example: str | None
    raised: bool = False

    @property
    def holds(self) -> bool:
        """Whether no case broke the law."""
        return self.example is None


@dataclass(frozen=True)
class Report:
    """All findings; prints as a table, followed by each breaking example.

    Args:
        findings: one for each law and subject.
        untried: modules of which no law says anything, each with the reason.
    """

    findings: tuple[Finding, ...]
    untried: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there was a law to try, and every one held."""
        return bool(self.findings) and all(finding.holds for finding in self.findings)

    def __str__(self) -> str:
        header = ("law", "on", "cases", "worst ratio", "claimed", "verdict")
        rows = [
            (
                f.law,
                _shortened(f.subject),
                str(f.cases),
                f"{f.worst:.6f}",
                str(f.grade),
                "holds" if f.holds else "RAISES" if f.raised else "BROKEN",
            )
            for f in self.findings
        ]
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        first = {f.law: f for f in reversed(self.findings) if f.example}
        told = {
            False: "is broken: {} fails here",
            True: "could not be measured: {} was tried, but the layer raised (one size of image only? then pass side)",
        }
        examples = [f"\n{f.law} {told[f.raised].format(f.statement)}\n\n{f.example}" for f in first.values()]
        untried = [f"\nno law was tried on {what}" for what in self.untried]
        return "\n".join([lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], *untried, *examples])


def _shortened(text: str, width: int = 44) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


class _Broken(Exception):
    pass


def run(
    law: Law,
    subject: Any,
    draws: st.SearchStrategy[Any],
    *,
    cases: int,
    first_seed: int = 0,
    where: Device = Device(),  # noqa: B008 (immutable)
    tick: Callable[[], object] = lambda: None,
) -> Finding:
    """Let Hypothesis try to break one law on one subject, and shrink what breaks it.

    Args:
        law: what is claimed.
        subject: what it is claimed of.
        draws: where cases come from.
        cases: how many to try, at most.
        first_seed: of Hypothesis's own randomness.
        where: device and dtype.
        tick: called after each case, for a progress bar.
    """
    count, worst = 0, 0.0
    broken: tuple[Any, str] | None = None
    raised = False

    def attempt(draw: Any) -> None:
        nonlocal count, worst, broken, raised
        try:
            measurement: Measurement = law(subject, draw, where)
        except Exception as error:  # whatever a user's layer may raise is a finding
            raised = True
            broken = draw, f"raises {type(error).__name__}: {error}"
            raise _Broken from error
        count += 1
        tick()
        ratio = measurement.ratio
        worst = max(worst, ratio) if ratio == ratio else float("inf")
        if not measurement.holds():
            raised = False
            broken = (
                draw,
                f"lhs = {float(measurement.lhs):.9g}, rhs = {float(measurement.rhs):.9g}, slack = {float(measurement.slack):.3g}",
            )
            raise _Broken
        target(min(ratio, 2.0))

    tried = settings(
        max_examples=cases,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large],
        phases=(Phase.generate, Phase.target, Phase.shrink),
    )(seed(first_seed)(given(draws)(attempt)))
    try:
        tried()
    except _Broken:
        pass
    except Flaky:
        broken = (
            (broken or (None,))[0],
            "the same case gave different results: the subject is not a function of its inputs",
        )
    example = None
    if broken is not None:
        draw, what = broken
        device = "" if where == Device() else f", Device(torch.device({str(where.device)!r}), {where.dtype})"
        example = f"    subject = {_code(subject)}\n    {type(law).__name__}()(subject, {draw!r}{device})\n    # {what}"
    return Finding(
        law.name, law.statement, law.grade, _code(subject), count, worst, example, raised and example is not None
    )


def _code(subject: Any) -> str:
    if isinstance(subject, Module) and not list(subject.atoms()) and subject.domain is not None:
        return f"({subject!r}).bind({subject.domain!r})"
    return repr(subject)


def subjects(thing: Any) -> list[Any]:
    """What to try the laws on, given what a user has: untyped bonds on several spaces, atoms together with their norms.

    Raises:
        InvalidArgument: the thing is none that laws are known for.
    """
    if isinstance(thing, Loss | Shaped | Objective):
        return [thing]
    if not isinstance(thing, Module):
        raise InvalidArgument(
            f"check was given {thing!r}, which is neither a module, a loss, a Shaped(norm, shape) nor an Objective(network, loss). "
            "Pass an instance, not a class or a function."
        )
    if thing.domain is None:
        return [bound for bound in (_bound(thing, space) for space in _SPACES) if bound is not None] or [_paired(thing)]
    norms = [Shaped(atom.norm, atom.shape) for atom in thing.weights().values()]
    return [thing, *dict.fromkeys(norms)]


_SPACES: tuple[Space, ...] = (Features(1), Features(4), SequenceSpace(3), Image(4), Volume(2), Logits(3))


def _bound(module: Module, space: Space) -> Module | None:
    try:
        return module.bind(space)
    except SpaceMismatch:
        return None


def _paired(module: Module) -> Module:
    """A bond that takes none of the plain spaces may take a pair of branches."""
    return module @ (Linear(3, 3), Linear(3, 3))


def laws_for(subject: Any, side: int | None = None) -> tuple[Sequence[Law], st.SearchStrategy[Any]]:
    """The laws that apply to a subject, and where their cases come from (``side`` as for ``check``)."""
    if isinstance(subject, Loss):
        laws, draws = LOSS_LAWS, loss_draws()
    elif isinstance(subject, Shaped):
        laws, draws = NORM_LAWS, norm_draws()
    elif isinstance(subject, Objective):
        laws, draws = DESCENT_LAWS, module_draws(side, _least_batch(subject.network))
    else:
        laws, draws = MODULE_LAWS, module_draws(side, _least_batch(subject))
    return [law for law in laws if law.applies(subject)], draws


def _least_batch(module: Module) -> int:
    """A batch norm, which alone has running statistics, takes two samples to have a deviation."""
    return 2 if module.buffers() else 1


def _silence(subject: Any) -> str | None:
    """Why the laws of modules say nothing of a subject, or None where they do, or it is no module."""
    if not isinstance(subject, Module) or any(law.applies(subject) for law in MODULE_LAWS):
        return None
    if isinstance(subject.codomain, Tuple):
        return f"{_code(subject)}: it gives a tuple, which has no single bound. Check it with what joins the parts."
    bound = subject.bound(constants="proved")
    return f"{_code(subject)}: its bound is {bound.grade}, and claims nothing of any input. It rests on {'; '.join(bound.assumptions)}."


def check(
    thing: Any,
    *,
    cases: int = 200,
    first_seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
    side: int | None = None,
    progress: bool = False,
) -> Report:
    """Try to break every law that applies to a module, a loss, a norm or a network with its loss.

    Args:
        thing: a module (a bond without a domain is tried on several), a loss, ``Shaped(norm, shape)`` or
            ``Objective(network, loss)``.
        cases: per law and subject, ≥ 1.
        first_seed: of the search; equal seeds try equal cases.
        device: where the laws are evaluated.
        dtype: in which; float64 leaves the least to rounding.
        side: pixels along each side of the images tried (and positions of the sequences), for modules that take one size
            only, such as those with a ``Flatten``; several sizes where not given.
        progress: whether to show a bar on standard error.

    Returns:
        A report; ``report.ok`` says whether all held, ``print(report)`` shows the table and any breaking example.

    Raises:
        InvalidArgument: no law is known for the thing.
    """
    if cases < 1:
        raise InvalidArgument(f"check was asked for {cases} cases per law; ask for at least 1")
    if side is not None:
        positive("the side of the images that check tries", side)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidArgument(f"check was asked for dtype={dtype!r}; laws are measured in a floating-point torch.dtype")
    where = Device(usable(device), dtype)
    tried = subjects(thing)
    plan = [(law, subject, laws_for(subject, side)[1]) for subject in tried for law in laws_for(subject)[0]]
    untried = tuple(why for subject in tried if (why := _silence(subject)) is not None)
    if not progress:
        return Report(tuple(run(*item, cases=cases, first_seed=first_seed, where=where) for item in plan), untried)
    from tqdm import tqdm  # only a bar needs it

    findings = []
    with tqdm(total=len(plan) * cases, unit="case", leave=False) as bar:
        for index, (law, subject, draws) in enumerate(plan):
            bar.set_description(law.name)
            findings.append(
                run(
                    law,
                    subject,
                    draws,
                    cases=cases,
                    first_seed=first_seed,
                    where=where,
                    tick=bar.update,
                )
            )
            bar.n = (index + 1) * cases
            bar.refresh()
    return Report(tuple(findings), untried)
