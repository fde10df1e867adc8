"""Names of operators: which only pass an activation on, which do not depend on values, and which view a weight."""

import operator
from typing import Any

from torch import fx

VIEWS = frozenset(
    "alias clone contiguous detach expand expand_as flatten lift_fresh_copy movedim permute reshape squeeze swapaxes t "
    "_to_copy to transpose type_as unflatten unsqueeze view view_as _unsafe_view float double half bfloat16 numpy_T".split()
)
"""The same numbers, laid out otherwise."""

PARTS = frozenset("getitem chunk narrow select slice split split_with_sizes tensor_split unbind".split())
"""Some of the numbers."""

HOMOGENEOUS = frozenset(
    "abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "alpha_dropout amax amin avg_pool1d avg_pool2d avg_pool3d bernoulli celu clamp clamp_max clamp_min constant_pad_nd cumsum diagonal dropout "
    "elu feature_alpha_dropout feature_dropout fft_fft2 fft_irfft fft_rfft fold gather gelu hardshrink hardswish hardtanh im2col "
    "col2im index index_select leaky_relu linalg_vector_norm masked_fill masked_select max max_pool1d max_pool2d max_pool3d "
    "max_pool2d_with_indices mean median min mish nan_to_num native_dropout neg norm pad permute_copy pixel_shuffle pixel_unshuffle "
    "channel_shuffle reflection_pad1d reflection_pad2d relu relu6 repeat repeat_interleave replication_pad1d replication_pad2d roll flip "
    "rot90 rrelu selu silu sin sinh softshrink softsign std sum take_along_dim tan tanh tanhshrink threshold tile topk sort trace tril "
    "triu unfold upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa asinh atan erf arctan real imag view_as_complex view_as_real "
    "grid_sampler grid_sampler_2d".split()
)
"""Without a constant term, of degree 1 or less: a relative change passes as it is."""

SUMS = frozenset("add sub rsub cat concat stack hstack vstack where lerp maximum minimum max_other min_other".split())
PRODUCTS = frozenset("mul multiply matmul mm bmm mv dot einsum outer kron".split())

LIPSCHITZ = {
    "cos": 1.0,
    "hardsigmoid": 1 / 6,
    "log_sigmoid": 1.0,
    "sigmoid": 0.25,
    "softplus": 1.0,
    "_softmax": 1.0,
    "softmax": 1.0,
    "log_softmax": 2.0,
    "_log_softmax": 2.0,
    "logsumexp": 1.0,
}
"""Bonds that are not 0 at 0: the largest slope, in the maximum norm of what a softmax takes."""

DEGREES = {"rsqrt": 0.5, "sqrt": 0.5, "reciprocal": 1.0, "square": 2.0, "var": 2.0}
"""Powers: the factor by which a small relative change grows."""

UNMOVED = frozenset(
    "argmax argmin argsort empty_like full_like isfinite isinf isnan new_empty new_full new_ones new_zeros ones_like rand_like randn_like "
    "sgn sign zeros_like eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not floor ceil round trunc "
    "sym_size size numel _assert_tensor_metadata _assert_async floor_divide remainder multinomial randint_like one_hot bucketize".split()
)
"""Results that a small change of activations leaves as they are: shapes, comparisons, roundings."""


def operator_name(node: fx.Node) -> str:
    """The operator's name without namespace of torch, overload, and the underscore of what writes in place."""
    target: Any = node.target
    if target is operator.getitem:
        return "getitem"
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", str(target))
    namespace, name = schema.name.split("::")
    if namespace != "aten":
        return f"{namespace}::{name}"
    kept = name if name.startswith("__") or not name.endswith("_") else name[:-1]
    overload = getattr(target, "_overloadname", "")
    # max and min of two tensors are sums, as far as changes go; of one they are reductions
    return f"{kept}_other" if kept in ("max", "min") and overload == "other" else kept


def writes_in_place(node: fx.Node) -> bool:
    """Whether the operator writes over its first argument."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema is not None else ""
    return name.endswith("_") and not name.startswith("__")
