"""Names of operators: which only pass an activation on, which do not depend on values, which multiply by a weight."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = _names(
    """
    _to_copy _unsafe_view adjoint alias bfloat16 clone contiguous detach double expand expand_as flatten float half
    lift_fresh_copy mH mT matrix_H movedim numpy_T permute reshape reshape_as squeeze swapaxes t to transpose type_as unflatten unsqueeze
    view view_as
    """
)
"""The same numbers, laid out otherwise."""

COPIES = frozenset(("clone", "_to_copy", "lift_fresh_copy"))

PARTS = _names(
    """
    chunk getitem narrow select slice split split_with_sizes tensor_split unbind
    """
)
"""Some of the numbers."""

ALIASES = (VIEWS | PARTS) - COPIES
"""Results that may share the memory of the first argument."""

HOMOGENEOUS = _names(
    """
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa abs adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d alpha_dropout amax amin
    arctan asinh atan avg_pool1d avg_pool2d avg_pool3d bernoulli celu channel_shuffle clamp clamp_max clamp_min
    col2im constant_pad_nd cumsum diagonal dropout elu erf feature_alpha_dropout feature_dropout fft_fft
    fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn
    flip fold fractional_max_pool2d gather gelu grid_sampler grid_sampler_2d hardshrink hardswish hardtanh im2col imag index
    index_select leaky_relu linalg_vector_norm masked_fill masked_select max max_pool1d max_pool2d
    max_pool2d_with_indices max_pool3d mean median min mish nan_to_num native_dropout neg norm pad permute_copy renorm embedding_renorm fill
    pixel_shuffle pixel_unshuffle real reflection_pad1d reflection_pad2d relu relu6 repeat repeat_interleave
    replication_pad1d replication_pad2d roll rot90 rrelu selu silu  softshrink softsign sort std sum
    take_along_dim tanh tanhshrink threshold tile topk trace tril triu unfold upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d view_as_complex view_as_real
    """
)
"""Without a constant term, of degree 1 or less: a relative change passes as it is."""

SELECTIONS = _names(
    """
    _log_softmax adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d clamp clamp_max clamp_min constant_pad_nd dropout flip
    gather hardtanh index index_select log_softmax masked_fill mean nan_to_num neg pad take_along_dim tanh
    """
)
"""Some or all of the numbers, means of them, or none beyond a cap: scores of classes stay such."""

SUMS = _names(
    """
    add cat cdist concat copy hstack index_add index_put lerp max_other maximum min_other minimum rsub scatter scatter_add
    select_scatter slice_scatter stack sub vstack where
    """
)
PRODUCTS = _names(
    """
    addcmul bilinear cosine_similarity dot einsum inner kron mul multiply outer tensordot
    """
)

QUOTIENTS = _names("div divide true_divide")

GROUPED = ("_grouped_mm", "transformers::grouped_mm_fallback")
"""Products of rows with the matrix of their group: experts."""

LIPSCHITZ = {
    "cos": 1.0,
    "logcumsumexp": 1.0,
    "remainder": 1.0,
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

DEGREES = {"glu": 2.0, "reciprocal": 1.0, "rsqrt": 0.5, "sqrt": 0.5, "square": 2.0, "var": 2.0}
"""Powers: the factor by which a small relative change grows."""

UNMOVED = _names(
    """
    _assert_async _assert_tensor_metadata argmax argmin argsort bincount bitwise_and bitwise_not bitwise_or
    bucketize ceil empty_like eq floor floor_divide full_like ge gt histc isfinite isinf isnan le logical_and
    logical_not logical_or lt multinomial ne new_empty new_full new_ones new_zeros nonzero numel one_hot
    ones_like rand_like randint_like randn_like round searchsorted sgn sign size sym_size trunc unique
    zeros_like
    """
)
"""Results that a small change of activations leaves as they are: shapes, comparisons, roundings."""

MATRICES: dict[str, tuple[int, ...]] = {
    "linear": (1,),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "bmm": (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
    "mv": (0,),
    **dict.fromkeys(GROUPED, (0, 1)),
}
"""Operators that multiply by a matrix, with the places where it may stand."""
