"""Attention, positions, normalisation, wiring and whole transformers as subjects of verification."""

from dataclasses import replace

from modula_agd.atom import Bias, Embedding, Linear, Scale, Unembedding
from modula_agd.attention import QKV, Attention, MergeHeads, SplitHeads
from modula_agd.bond import GELU, Identity, Mean, Multiply, Softmax, ToSequence
from modula_agd.compound import SwiGLU, residual
from modula_agd.dropout import Dropout, WithDropout
from modula_agd.normalisation import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from modula_agd.position import Positions, Rotary
from modula_agd.space import Features, Heads, Image, Logits, Mask, Sequence, Tokens, Tuple
from modula_agd.verify.construction import EXACT, MEAN, SPIKES, STATIC, WITNESS, Construction
from modula_agd.wiring import Shared, Take, each

HEADS = Heads(2, 3)
_QKV = Tuple((HEADS, HEADS, HEADS))

# Two groups of opposite keys and values, balanced by the scores (σ = 1: one key against seven, e² = 7.4), of which the step
# moves the weight from one group to the other, while all values move alike.
_TUG = replace(
    WITNESS, inputs="constant|lone|lone", input_steps="along|along|constant", side=8, input_step=0.01, magnitude=1.0
)
_UNLIKE = {"second order": "its terms are attained at different places"}
_HIDDEN = {"growth": "a masked position has other groups than the one that attains it"}

_CORNER = replace(WITNESS, inputs="corner", magnitude=1e3)
_SMALL_CORNER = replace(WITNESS, inputs="corner", magnitude=1e-6)
# ‖x‖² = ε/4 is where x/sqrt(‖x‖² + ε) is most curved; ε = 1e-6
_CURVED = replace(WITNESS, magnitude=0.5e-3, input_step=1e-3)
_TURNED = replace(WITNESS, inputs="constant", input_steps="corner", magnitude=1e3, input_step=1e-3)
_RMS = {
    "magnitude": _CORNER,
    "growth": replace(WITNESS, magnitude=1e-6),
    "second order": _CURVED,
    "floor": _TURNED,
}
_SPREAD = {"growth": "one position cannot take all of the change and all of the norm"}
_CENTRED = {"floor": "attained by RMSNorm on what subtracting the mean leaves, which no kind of draw is"}

STRUCTURED: dict[str, Construction] = {
    "Attention": Construction(Attention().bind(_QKV), {"growth": _TUG}, STATIC | _UNLIKE),
    "Attention, causal": Construction(Attention(causal=True, scale=0.5).bind(_QKV), loose=STATIC | _UNLIKE | _HIDDEN),
    "Attention, padded": Construction(Attention().bind(Tuple((_QKV, Mask()))), loose=STATIC | _UNLIKE | _HIDDEN),
    "Attention, dropped": Construction(
        Attention(causal=True, dropout=0.3).bind(_QKV),
        loose=STATIC | _UNLIKE | {"growth": "attained where nothing is dropped by chance"},
    ),
    "QKV": Construction(Take(0) @ QKV(2, 3, 4), dict.fromkeys(("magnitude", "growth", "second order"), SPIKES)),
    "QKV per head": Construction(Take(1) @ QKV(2, 3, 4, per_head=True)),
    "Linear into Heads": Construction(Linear(Heads(2, 3), Sequence(4))),
    "Bias on Heads": Construction(Bias(HEADS), loose=MEAN | EXACT),
    "Scale on Heads": Construction(Scale(HEADS)),
    "SplitHeads": Construction(
        SplitHeads(2).bind(Sequence(6)),
        dict.fromkeys(("magnitude", "growth"), replace(WITNESS, inputs="spike")),
        STATIC | EXACT,
    ),
    "MergeHeads": Construction(MergeHeads().bind(HEADS), loose=STATIC | EXACT),
    "Rotary": Construction(Rotary().bind(Heads(1, 4)), loose=STATIC | EXACT),
    "Positions on Tokens": Construction(Positions(3, 5).bind(Tokens(4)), loose=EXACT),
    "Positions on Sequence": Construction(Positions(3, 5).bind(Sequence(2)), loose=EXACT),
    "Unembedding": Construction(Unembedding(4, 3)),
    "Softmax": Construction(
        Softmax().bind(Logits(2)),
        {
            "growth": replace(WITNESS, inputs="zero", input_steps="corner", magnitude=1.0, input_step=0.01),
            "second order": replace(WITNESS, inputs="corner", magnitude=0.6585, input_step=1e-3),
        },
        {**STATIC, "magnitude": "probabilities are below 1"},
    ),
    "ToSequence": Construction(ToSequence().bind(Image(2)), loose=STATIC | EXACT),
    "RMSNorm": Construction(RMSNorm().bind(Features(4)), _RMS, STATIC),
    "RMSNorm on Image": Construction(RMSNorm().bind(Image(4)), _RMS, STATIC),
    "LayerNorm": Construction(
        LayerNorm().bind(Sequence(4)),
        {"magnitude": _CORNER, "growth": _SMALL_CORNER, "second order": replace(_CURVED, inputs="corner")},
        STATIC | _CENTRED,
    ),
    "GroupNorm": Construction(GroupNorm(2, 16).bind(Image(4)), {"magnitude": _CORNER}, STATIC | _SPREAD | _CENTRED, 4),
    "BatchNorm": Construction(
        BatchNorm(48).bind(Image(2)), {"magnitude": replace(_CORNER, batch=3)}, STATIC | _SPREAD | _CENTRED, 4
    ),
    "Dropout": Construction(Dropout(0.3).bind(Features(4)), loose=STATIC | EXACT),
    "WithDropout": Construction(
        WithDropout(0.3, Linear(3, 3)),
        loose=dict.fromkeys(("magnitude", "growth", "second order"), "attained where nothing is dropped"),
    ),
    "Shared": Construction(Shared("both", Linear(3, 3)) @ Shared("both", Linear(3, 3))),
    "each": Construction(
        Multiply() @ each(Linear(3, 3), Scale(3)) @ (Linear(3, 3), Linear(3, 3)),
        dict.fromkeys(("magnitude", "growth", "second order"), SPIKES),
    ),
    "SwiGLU": Construction(
        SwiGLU(4, 3), loose=dict.fromkeys(("magnitude", "growth", "second order"), "|SiLU(x)| < |x|") | MEAN
    ),
    "attention block": Construction(
        residual(
            Linear(Sequence(4), Sequence(4)) @ MergeHeads() @ Attention(causal=True) @ QKV(2, 2, 4, per_head=True), 2
        ),
        loose=dict.fromkeys(("growth", "second order"), "attention attains it for independent queries, keys and values")
        | MEAN,
    ),
    "transformer": Construction(
        Linear(Logits(3), 4)
        @ Mean()
        @ residual(
            (
                Linear(Sequence(4), Sequence(4)) @ MergeHeads() @ Attention() @ QKV(1, 4, 4) @ LayerNorm(eps=0.1),
                Linear(Sequence(4), Sequence(5)) @ GELU() @ Linear(Sequence(5), Sequence(4)) @ LayerNorm(eps=0.1),
            ),
            1,
        )
        @ (0.5 * Embedding(4, 5) + 0.5 * Positions(4, 4)),
        loose=dict.fromkeys(
            ("magnitude", "growth", "second order", "ceiling depth"), "each block attains it elsewhere"
        ),
    ),
    "tied": Construction(
        Shared("table", Unembedding(5, 4))
        @ (0.5 * Identity() + 0.5 * Linear(Sequence(4), Sequence(4)))
        @ Shared("table", Embedding(4, 5)),
        loose=MEAN,
    ),
}
"""Witnesses where a law is attained; the reason where it is not."""
