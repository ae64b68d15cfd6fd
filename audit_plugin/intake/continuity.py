"""Which of torch's operators are continuous in what they read: a small change of it changes their result but little.

A list of those that are, because the others are too many to foresee: besides comparisons and rounding, ``fmax`` decides by
what is no number, ``quantile`` may pick a neighbour, a norm of order 0 counts. Image classifiers are made of what is listed.
"""

from __future__ import annotations

from audit_plugin.intake.operators import words

CONTINUOUS = frozenset(
    words(
        # arithmetic and pointwise functions; not tan, whose poles with atan make a rounding
        "abs acos acosh add addcdiv addcmul asin asinh atan atanh clamp clamp_max clamp_min clip cos cosh deg2rad div "
        "divide erf erfc exp exp2 expm1 float_power hypot lerp log log10 log1p log2 logaddexp logaddexp2 maximum "
        "minimum mul multiply neg negative positive pow rad2deg reciprocal rsqrt rsub sigmoid sin sinc sinh "
        "special_erf special_expit special_log_softmax special_softmax sqrt square sub subtract tanh true_divide "
        # activations; not _safe_softmax, which is zero where all are minus infinity
        "celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_softmax mish prelu _prelu_kernel "
        "relu relu6 rrelu selu silu softmax softplus softshrink swish _softmax _log_softmax "
        # convolutions, matrix products, attention, recurrence
        "addbmm addmm addmv addr baddbmm bilinear bmm chain_matmul conv1d conv2d conv3d conv_transpose1d "
        "conv_transpose2d conv_transpose3d convolution _convolution cosine_similarity cross dot einsum gru inner kron "
        "linear lstm matmul mm mv outer rnn_relu rnn_tanh scaled_dot_product_attention tensordot vdot "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_flash_attention _scaled_dot_product_attention_math "
        # normalisation, dropout
        "alpha_dropout batch_norm cudnn_batch_norm dropout feature_alpha_dropout feature_dropout group_norm "
        "instance_norm layer_norm local_response_norm native_batch_norm native_dropout native_group_norm "
        "native_layer_norm normalize rms_norm _fused_rms_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training "
        # pooling, resampling
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d affine_grid_generator avg_pool1d avg_pool2d "
        "avg_pool3d grid_sampler grid_sampler_2d lp_pool1d lp_pool2d max_pool1d max_pool1d_with_indices max_pool2d "
        "max_pool2d_with_indices max_pool3d max_pool3d_with_indices upsample_bicubic2d upsample_bilinear2d "
        "upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest_exact2d upsample_trilinear3d "
        "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d "
        # reductions; not sort and topk, which put what is no number last
        "amax amin aminmax cummax cummin cumprod cumsum fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn "
        "fft_irfft fft_irfft2 fft_rfft fft_rfft2 linalg_matrix_norm linalg_norm linalg_vector_norm logcumsumexp "
        "logsumexp max mean median min norm prod std std_mean sum var var_mean "
        # complex numbers
        "complex polar"
    )
)
"""In all that they read, wherever the result is no whole number; a few only with ordinary settings, see program_flow.py."""

WITH_BRANCHES = frozenset(words("acos acosh asin asinh atan atanh float_power log log10 log1p log2 pow rsqrt sqrt"))
"""Which jump for complex numbers: the imaginary part of a logarithm is the sign of what it is taken of."""

REARRANGING = frozenset(
    words(
        "adjoint alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to cat channel_shuffle "
        "chunk clone concat concatenate constant_pad_nd contiguous copy detach diag diag_embed diagonal dsplit dstack "
        "expand expand_as fft_fftshift fft_ifftshift fill flatten flip fliplr flipud hsplit hstack im2col imag lift "
        "lift_fresh lift_fresh_copy meshgrid moveaxis movedim mT narrow numpy_T pad permute pixel_shuffle "
        "pixel_unshuffle ravel real reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave "
        "replication_pad1d replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg roll rot90 "
        "select select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes swapdims t "
        "tensor_split tile to transpose tril triu type_as unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze "
        "view view_as view_as_complex view_as_real vsplit vstack zero _to_copy _unsafe_view"
    )
)
"""Whose result holds the very numbers that they read, so a whole number in it was one before, or was rounded here."""

PLACED = frozenset(words("embedding gather index index_select take take_along_dim"))
"""Continuous in where they read from, not in the places that they read."""

MASKED = frozenset(
    words("index_add index_copy index_fill index_put masked_fill masked_scatter scatter scatter_add scatter_reduce where")
)
"""Continuous in all but their places, masks and conditions, which are never numbers with a fraction."""

WITH_PLACES = frozenset(
    words(
        "max min sort topk median cummax cummin max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d native_dropout"
    )
)
"""Whose second result is a place or a mask, a decision."""

BY_CHANCE = frozenset(words("bernoulli normal rand rand_like randint randn randn_like randperm uniform"))
CHANCE_IN_TRAINING = frozenset(
    words(
        "alpha_dropout dropout feature_alpha_dropout feature_dropout gru lstm native_dropout rnn_relu rnn_tanh rrelu "
        "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention _scaled_dot_product_attention_math"
    )
)
"""Which drop at random what they are told to."""
