"""The operators that a graph may call. A list, because among torch's operators are some that read or write files
(``aten.from_file``, ``aten.save``), ignore the bounds of memory (``aten._reshape_alias``, ``aten.set_``) or compile
text (``aten._nnc_*``, custom libraries)."""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """The words of a long list, which is easier to read without quotation marks."""
    return text.split()


_ATEN = frozenset(
    words(
        # arithmetic and pointwise functions
        "abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_left_shift "
        "bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos "
        "cosh deg2rad digamma div divide eq erf erfc erfinv exp exp2 expm1 fill fix float_power floor floor_divide "
        "fmax fmin fmod frac ge greater greater_equal gt hypot isfinite isinf isnan ldexp le lerp less less_equal "
        "lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt "
        "masked_fill maximum minimum mul multiply nan_to_num ne neg negative not_equal pow positive rad2deg "
        "reciprocal remainder round rsqrt rsub sgn sigmoid sign signbit sin sinc sinh special_erf special_expit "
        "special_log_softmax special_softmax sqrt square sub subtract tan tanh true_divide trunc where xlogy zero "
        # activations
        "celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_softmax mish prelu "
        "_prelu_kernel relu relu6 rrelu selu silu softmax softplus softshrink swish threshold _softmax _log_softmax "
        "_safe_softmax "
        # convolutions, matrix products, attention, recurrence
        "addbmm addmm addmv addr baddbmm bilinear bmm chain_matmul conv1d conv2d conv3d conv_transpose1d "
        "conv_transpose2d conv_transpose3d convolution _convolution cosine_similarity cross dot einsum embedding "
        "gru inner kron linear lstm matmul mm mv outer rnn_relu rnn_tanh scaled_dot_product_attention tensordot "
        "vdot _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_flash_attention _scaled_dot_product_attention_math "
        # normalisation, dropout, noise
        "alpha_dropout batch_norm bernoulli cudnn_batch_norm dropout feature_alpha_dropout feature_dropout "
        "group_norm instance_norm layer_norm local_response_norm native_batch_norm native_dropout native_group_norm "
        "native_layer_norm normalize rms_norm _fused_rms_norm _native_batch_norm_legit "
        "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training normal rand rand_like randn "
        "randn_like randint randperm uniform "
        # pooling, resampling, padding
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d affine_grid_generator avg_pool1d avg_pool2d "
        "avg_pool3d channel_shuffle constant_pad_nd grid_sampler grid_sampler_2d im2col lp_pool1d lp_pool2d "
        "max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices "
        "pad pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
        "replication_pad2d replication_pad3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest_exact2d upsample_trilinear3d _upsample_bicubic2d_aa "
        "_upsample_bilinear2d_aa _upsample_nearest_exact2d "
        # reductions, sorting, searching
        "all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum dist fft_fft "
        "fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_rfft "
        "fft_rfft2 linalg_matrix_norm linalg_norm linalg_vector_norm logcumsumexp logsumexp max mean median min "
        "nanmean nansum norm prod quantile sort std std_mean sum topk var var_mean "
        # shapes, views, selections
        "alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to cat chunk clone concat "
        "concatenate contiguous detach diag diag_embed diagonal dsplit dstack expand expand_as flatten flip fliplr "
        "flipud gather hsplit hstack index index_add index_copy index_fill index_put index_select masked_scatter "
        "masked_select meshgrid moveaxis movedim narrow permute ravel repeat repeat_interleave reshape reshape_as "
        "resolve_conj resolve_neg roll rot90 scatter scatter_add scatter_reduce select select_scatter slice "
        "slice_scatter split split_with_sizes squeeze stack swapaxes swapdims t take take_along_dim tensor_split "
        "tile transpose tril triu unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as "
        "view_as_complex view_as_real vsplit vstack numpy_T mT adjoint real imag tril_indices triu_indices _unsafe_view "
        # creation, conversion, sizes
        "arange bool byte complex copy double empty empty_like empty_permuted eye float full full_like half int "
        "int_repr lift lift_fresh lift_fresh_copy linspace logspace long new_empty new_full new_ones new_zeros "
        "one_hot ones ones_like polar scalar_tensor short to type_as zeros zeros_like _to_copy item "
        "_local_scalar_dense sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_storage_offset "
        "sym_stride _assert_async _assert_scalar _assert_tensor_metadata "
    )
)
_OVERLOAD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# Attributes of the object that holds the overloads, not overloads.
_NO_OVERLOADS = frozenset({"op", "overloads", "name", "decompose"})

_SYMBOLIC = frozenset(
    [f"_operator.{name}" for name in words("eq ne le ge lt gt neg pos mul add sub floordiv mod truediv and_ or_ rshift")]
    + [f"torch.sym_{name}" for name in words("not int float ite max min sqrt")]
    + ["math.trunc"]
)

WRAPPERS = frozenset(f"torch.ops.higher_order.wrap_with_{name}" for name in ("set_grad_enabled", "autocast"))
"""Run their sub-graph once, unconditionally: what ``torch.no_grad`` and ``torch.autocast`` inside a model become."""


def is_allowed(target: str) -> bool:
    """Whether a node may call ``target``, in the spelling of the file. Sub-graph wrappers are not included.

    >>> is_allowed("torch.ops.aten.relu_.default"), is_allowed("torch.os.system"), is_allowed("_operator.attrgetter")
    (True, False, False)
    """
    if target in _SYMBOLIC:
        return True
    match target.split("."):
        case ["torch", "ops", "aten", name, overload]:
            # A trailing underscore is the in-place form.
            listed = name in _ATEN or name.removesuffix("_") in _ATEN
            return listed and bool(_OVERLOAD.fullmatch(overload)) and overload not in _NO_OVERLOADS
    return False


def is_in_place(target: str) -> bool:
    """Whether ``target`` changes its first argument."""
    parts = target.split(".")
    return len(parts) == 5 and parts[3].endswith("_")
