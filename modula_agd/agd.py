"""Methods from a network and a loss: ``agd`` with its options, AGD as published, and the named configurations."""

from collections.abc import Callable
from typing import Literal

from modula_agd.decay import Decay, Fading, decay_of
from modula_agd.error import InvalidArgument, SpaceMismatch
from modula_agd.loss import Loss
from modula_agd.majorisation import Certified, ClosedForm, ExactGrowth, Search
from modula_agd.method import Method
from modula_agd.network import Network
from modula_agd.run import Constants
from modula_agd.space import finite
from modula_agd.step_average import POWER

MOMENTUM = 0.95
"""β where nothing else is asked for; 0.8, 0.9 and 0.98 were behind where they were tried (docs/trials.md)."""


def agd(
    network: Network,
    loss: Loss,
    *,
    direction: Literal["spectral", "frobenius"] = "spectral",
    search: Search | None = None,
    sizes: Literal["prescribed", "tracked"] | None = None,
    constants: Constants | None = None,
    magnitude: float = 1.0,
    nonfinite: Literal["raise", "skip"] = "raise",
    momentum: float | Literal["auto"] | None = "auto",
    smoothing: float | Literal["auto"] = "auto",
    refresh: int | Literal["auto"] = "auto",
    decay: float | Decay = 0.0,
    relaxation: float | Literal["auto"] = "auto",
    precision: Literal["auto", "full", "half"] = "auto",
    curvature: Literal["auto", "measured", "declared"] = "auto",
    balance: Literal["auto", "measured", "declared"] = "auto",
    step_average: float | Literal["auto"] | None = "auto",
    rows: Literal["auto", "measured", "declared"] = "auto",
    stretch: Literal["auto", "measured", "declared"] = "auto",
) -> Method:
    """A method without a learning rate, derived from what the network and the loss declare.

    Args:
        network: any module with settled spaces.
        loss: what to minimise.
        direction: "spectral", the exact dual direction of each operator norm, or "frobenius", a cheaper one in a larger
            norm (the AGD paper's), for which every bound stays true.
        search: how t is chosen; ``ExactGrowth()`` by default.
        sizes: ω_k "prescribed" at the declared sizes (default) or "tracked", certified bounds of the current norms.
        constants: "typical" (default) or "proved" Lipschitz constants.
        magnitude: a₀, declared bound of the inputs' norms; a certified search measures it instead.
        nonfinite: what a NaN or infinite gradient does: "raise", or "skip" the step and count it.
        momentum: β, 0 ≤ β < 1, for minibatches: the direction is made of past gradients, and the fresh one measures the
            descent along it; the newest of the past counts for 2(1 − β) more, at most 1/2 (``held_out.py``). None, for full batches,
            makes both of the same gradient. "auto" is 0.95, and None for a certified search.
        smoothing: β_s, 0 ≤ β_s < 1, of the mean of measured descents, where there is momentum. "auto" is the momentum's.
        refresh: steps ≥ 1 that a spectral direction serves where there is momentum; above 1 each is kept, which is one more
            buffer of the weight's size. "auto" is 1 on an accelerator, in compiled code and for short sides below 128, and up to 8
            on a CPU; a number above 1 cuts the graph of compiled code.
        decay: what a weight loses of itself beside a step (``decay.py``): a number λ ≥ 0, relative weight decay, by which a weight of norm
            ω loses λ·x·p·m·t of itself while it moves by x·p·m·t·ω, so that its norm tends to at most size/λ (times sqrt(i) of rows into
            logits, which go so much further); or ``Fading()``, which has no unit to choose and spares
            biases, gains and, under cross-entropy, the last layer. No part of the majorant.
        relaxation: multiple > 0 of its minimiser that a majorant asks for. "auto" is, where curvature is measured,
            1 at first and up to 2 as the run goes on, the longer the less steady the measured descents are (``held_out.py``); 1
            elsewhere. Above 1 it is assumed, not derived, that the loss bears it.
        precision: in which polar factors are iterated: "half" is bfloat16, whatever the weights; "full" float32, or float64 of
            such weights, and nothing that is kept is shorter. "auto" iterates in bfloat16 on CUDA, but for float64, and in float32
            elsewhere; directions are made of past gradients in bfloat16 then.
        curvature: of the loss bound: "measured", as past steps found it (``curvature.py``), where scores of classes count with a
            magnitude of at least 1, and which keeps each weight's last direction (one more buffer of half its size), or "declared".
            "auto" is measured where there is momentum.
        balance: of the weights' steps: "measured", by how much of its slope each was seen to use up (``balance.py``), or "declared", equal
            relative steps times masses. "auto" is measured where curvature is, but for tracked sizes and a closed form, whose growth
            portions would change.
        step_average: ρ ≥ 0: a step is the mean of those that the majorants of about the last 1/(ρ + 1) of the run asked for
            (``step_average.py``); None takes the newest majorant's alone. "auto" is 1 where there is momentum, and None elsewhere.
        rows: of embeddings, positions and matrices into logits: "measured", each row goes by the share of signal in its past gradients,
            and rows into logits sqrt(i) times as far as a unit step (``row_signal.py``), or "declared", all at full length. "auto" is
            measured where there is momentum, but for a captured model, whose bound has the alignment of its example.
        stretch: "measured", weights whose way from the averaged weights still leads downhill go up to 8 times as far, and up to twice
            where outputs grow with several weights at once; those of a captured model up to twice, and not at all where outputs grow so
            (``stretch.py``). It asks for averaged weights, which ``AGD`` and the command line give ``update``. With "declared" none
            goes further. "auto" is measured where there is momentum.

    Raises:
        InvalidArgument: an option is unknown, or contradicts the search.
        SpaceMismatch: network and loss are not what they should be.
        UnknownBound: the search needs a bound that the network does not have.
    """
    search = ExactGrowth() if search is None else search
    if not isinstance(search, Search):
        raise InvalidArgument(
            f"agd was given search={search!r}; pass an instance such as ExactGrowth() or ClosedForm()"
        )
    if isinstance(loss, type) and issubclass(loss, Loss):
        raise SpaceMismatch(f"agd was given the class {loss.__name__}. Pass an instance: {loss.__name__}().")
    if not isinstance(network, Network) or not isinstance(loss, Loss):
        raise SpaceMismatch(
            f"agd(network, loss) takes a modula_agd network and a modula_agd loss, but got {type(network).__name__} and "
            f"{type(loss).__name__}. Build the network from modules such as Linear or by from_torch(model, example), the loss as "
            "CrossEntropy()."
        )
    wanted = ("tracked", "proved") if search.needs_evidence else ("prescribed", "typical")
    sizes, constants = sizes or wanted[0], constants or wanted[1]
    for what, value, allowed in (
        ("direction", direction, ("spectral", "frobenius")),
        ("sizes", sizes, ("prescribed", "tracked")),
        ("constants", constants, ("typical", "proved")),
        ("nonfinite", nonfinite, ("raise", "skip")),
        ("precision", precision, ("auto", "full", "half")),
        ("curvature", curvature, ("auto", "measured", "declared")),
        ("balance", balance, ("auto", "measured", "declared")),
        ("rows", rows, ("auto", "measured", "declared")),
        ("stretch", stretch, ("auto", "measured", "declared")),
    ):
        if value not in allowed:
            raise InvalidArgument(f"agd was given {what}={value!r}; choose one of {allowed}")
    if search.needs_evidence and (sizes, constants) != wanted:
        raise InvalidArgument(
            f"a certified search was combined with {sizes} sizes and {constants} constants, which certify nothing. "
            "Leave both out: it takes tracked sizes and proved constants."
        )
    if not (finite(magnitude) and magnitude > 0):
        raise InvalidArgument(f"agd was given magnitude={magnitude!r}; the inputs' norm bound must be > 0 and finite")
    if all(atom.mass == 0 for atom in network.weights().values()):
        raise InvalidArgument(f"{network!r} has no weight to train: every atom has mass 0, or there is none")
    if momentum == "auto":
        momentum = None if search.needs_evidence else MOMENTUM
    if momentum is not None and not (finite(momentum) and 0 <= momentum < 1):
        raise InvalidArgument(f"agd was given momentum={momentum!r}, which must be at least 0 and below 1, or None")
    if momentum is not None and search.needs_evidence:
        raise InvalidArgument(
            "a certified search was combined with momentum, but it certifies steps along the gradient of a full batch. "
            "Leave momentum out."
        )
    if smoothing != "auto" and not (finite(smoothing) and 0 <= smoothing < 1):
        raise InvalidArgument(f"agd was given smoothing={smoothing!r}, which must be at least 0 and below 1")
    if smoothing != "auto" and momentum is None:
        raise InvalidArgument(
            "agd was given smoothing without momentum, where the descent is the gradient's own and nothing is averaged. "
            "Leave smoothing out."
        )
    if refresh != "auto" and not (isinstance(refresh, int) and not isinstance(refresh, bool) and refresh >= 1):
        raise InvalidArgument(f"agd was given refresh={refresh!r}, which must be a whole number of steps ≥ 1")
    rule = decay_of(decay)
    if rule is not None and search.needs_evidence:
        raise InvalidArgument(
            "a certified search was combined with decay, which raises the loss where it pulls against the gradient. "
            "Leave decay out."
        )
    for what, value in (("curvature", curvature), ("balance", balance), ("rows", rows), ("stretch", stretch)):
        if value == "measured" and momentum is None:
            raise InvalidArgument(
                f"agd was given a measured {what} without momentum, where no gradient is fresh to the directions. Leave {what} out."
            )
    if curvature == "auto":
        curvature = "declared" if momentum is None else "measured"
    if rows == "auto":
        rows = "declared" if momentum is None or network.captured else "measured"
    if stretch == "auto":
        stretch = "declared" if momentum is None else "measured"
    fixed = sizes == "tracked" or isinstance(search, ClosedForm)
    if balance == "auto":
        balance = "declared" if fixed else curvature
    if balance == "measured" and fixed:
        raise InvalidArgument(
            f"agd was given a measured balance with {search!r} and {sizes} sizes, but portions keep the growth of exact growth at declared "
            "sizes alone. Leave balance out."
        )
    by_steadiness = relaxation == "auto" and curvature == "measured"
    if relaxation == "auto":
        relaxation = 1.0
    if not (finite(relaxation) and relaxation > 0):
        raise InvalidArgument(f"agd was given relaxation={relaxation!r}, which must be a finite number > 0")
    if relaxation != 1 and search.needs_evidence:
        raise InvalidArgument(
            "a certified search was combined with relaxation, but certifies the minimiser of its majorant alone. "
            "Leave relaxation out."
        )
    if step_average == "auto":
        step_average = None if momentum is None else POWER
    elif step_average is not None and not (finite(step_average) and step_average >= 0):
        raise InvalidArgument(
            f"agd was given step_average={step_average!r}, which must be a finite number ≥ 0, or None"
        )
    elif step_average is not None and momentum is None:
        raise InvalidArgument(
            "agd was given step_average without momentum, where a step answers the very gradient that it descends. Leave "
            "step_average out."
        )
    mean = momentum if smoothing == "auto" else smoothing
    period = None if refresh == "auto" else refresh
    method = Method(
        network,
        loss,
        direction,
        search,
        sizes,
        constants,
        float(magnitude),
        nonfinite,
        momentum,
        mean,
        period,
        rule,
        None if by_steadiness else float(relaxation),
        precision,
        curvature,
        balance,
        None if step_average is None else float(step_average),
        rows,
        stretch,
    )
    method._conversion()
    search.check(network.bound(0.0, magnitude=magnitude, constants=constants))
    return method


def published(network: Network, loss: Loss) -> Method:
    """AGD exactly as published: Frobenius directions, depth counted in parameter tensors, magnitude 1, declared sizes.

    The declared size is 1 for every weight matrix. The paper has no biases; here a ``Bias`` counts with its own size. A convolution
    is the AGD code's with ``geometry="taps"``, which ``VGG16`` and ``ResNet`` have without normalisation alone.

    Args:
        network: typed modules, whose parameter tensors are counted.
        loss: to be lowered.

    Raises:
        InvalidArgument: the network has no parameter.
        SpaceMismatch: the network and the loss do not go together, or either is none.
    """
    # what is no network is for agd to refuse
    tensors = len(network.weights()) if isinstance(network, Network) else 1
    return agd(network, loss, direction="frobenius", search=ClosedForm(depth=tensors, magnitude=1.0), momentum=None)


METHODS: dict[str, Callable[[Network, Loss], Method]] = {
    "held-out": agd,
    "fading": lambda network, loss: agd(network, loss, decay=Fading()),
    "agd": published,
    "closed-form": lambda network, loss: agd(network, loss, search=ClosedForm(), momentum=None),
    "exact": lambda network, loss: agd(network, loss, search=ExactGrowth(), momentum=None),
    "certified": lambda network, loss: agd(network, loss, search=Certified()),
}
"""Named configurations, for command lines and comparisons."""
