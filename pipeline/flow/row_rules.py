"""How each operation of a forward carries the rows of a batch from its inputs to its outputs.

Layer 1. Where an operation leaves it unclear, the answer is None: a site there is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from pipeline.flow.operators import (
    BATCH_NORMS,
    CONVOLUTIONS,
    DATA_NORMS,
    DROPOUTS,
    ELEMENTWISE,
    LAYERS,
    POOLS,
    TRANSPOSED,
    words,
)
from pipeline.flow.row_joins import JOINS, MANY, REDUCTIONS, Sources, joined, reduced
from pipeline.flow.row_views import KEEP_ALL, ONE, PARTS, Arguments, axis_of
from pipeline.flow.row_writes import PUTS
from pipeline.flow.rows import Rows, Shape, agreed, along, whole

# element by element, yet no step from a weight to its gate
_ALIKE = words(
    "copy fill zero fill_diagonal __and__ __or__ __xor__ __iand__ __ior__ __ixor__ __lshift__ __rshift__ bitwise_xor "
    "bitwise_left_shift bitwise_right_shift logical_xor greater greater_equal less less_equal not_equal fmax fmin "
    "absolute fix frac conj conj_physical _conj resolve_conj resolve_neg _neg_view real imag angle polar complex "
    "isneginf isposinf isreal isclose signbit copysign logaddexp2 arctan2 ldexp lgamma digamma special_gammaln erfinv "
    "i0 special_i0 special_log_ndtr special_ndtr special_xlog1py special_logit special_sinc deg2rad rad2deg acos acosh "
    "asin asinh arccos arccosh arcsin arcsinh arctanh bucketize tril triu bernoulli masked_fill index_fill isin "
    "log_normal uniform normal random exponential lift lift_fresh_copy _softmax_backward_data sigmoid_backward "
    "tanh_backward threshold_backward gelu_backward silu_backward searchsorted frexp quantize_per_tensor "
    "quantize_per_tensor_dynamic quantize_per_channel dequantize fake_quantize_per_tensor_affine "
    "fake_quantize_per_channel_affine fake_quantize_per_tensor_affine_cachemask "
    "fake_quantize_per_channel_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams "
    "_fake_quantize_learnable_per_tensor_affine _fake_quantize_learnable_per_channel_affine"
)
# element by element, unless they are reduced
_LOSSES = words(
    "mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits "
    "kl_div"
)
# of each row on its own, on the axes that it has: layers, norms and pools by channels and places
_KEEP_AXES = (
    LAYERS
    | DATA_NORMS
    | BATCH_NORMS
    | POOLS
    | DROPOUTS
    | words(
        "bilinear glu avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool3d "
        "max_unpool2d max_unpool3d scaled_dot_product_attention _scaled_dot_product_flash_attention "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention lstm_cell gru_cell rnn_tanh_cell "
        "rnn_relu_cell _thnn_fused_lstm_cell _thnn_fused_gru_cell upsample_nearest1d upsample_nearest2d "
        "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator pixel_shuffle "
        "pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im local_response_norm stft istft one_hot "
        "view_as_real view_as_complex cross linalg_cross torchvision::deform_conv2d"
    )
)
# of matrices on the last two axes
_OF_MATRICES = words(
    "linalg_inv inverse linalg_inv_ex pinverse linalg_pinv matrix_exp linalg_matrix_exp matrix_power "
    "linalg_matrix_power linalg_cholesky cholesky linalg_cholesky_ex linalg_qr qr linalg_svd svd _linalg_svd "
    "linalg_svdvals linalg_eigh _linalg_eigh linalg_eigvalsh linalg_eig linalg_eigvals linalg_det det logdet slogdet "
    "_linalg_det linalg_slogdet _linalg_slogdet linalg_solve _linalg_solve_ex linalg_solve_triangular linalg_lstsq "
    "triangular_solve cdist _cdist_forward linalg_matrix_norm linalg_lu_factor linalg_lu_factor_ex"
)
# make an axis of their own behind the others
_APPENDING = words("one_hot view_as_real")


def follow(name: str, given: Arguments, sources: Sources, new: Shape, part: int = 0) -> Rows | None:
    """Rows of output `part` of operation `name`, of shape `new`; `given` are its arguments by name."""
    known = [(source.rows, source.shape) for source in sources if source.rows is not None]
    if not known:
        return None
    if known[0][0].rows == 1:
        # there is no other
        return whole(0, 1)
    if name == "copy" and sources[-1].tensor is given.get("src"):
        # what was there before is gone
        sources, known = sources[-1:], known[-1:] if sources[-1].rows is not None else []
        if not known:
            return None
    if name in PUTS and known[0][0].rows > 1:
        return PUTS[name](given, sources, new, part)
    if all(rows.axis is None for rows, _ in known) and name not in JOINS and name != "stack":
        # whatever is computed from one row alone belongs to it
        return agreed([rows for rows, _ in known])
    if name in JOINS:
        return joined(sources, given.get("dim", given.get("axis", 0)) % len(new), new)
    if name in MANY:
        return MANY[name](given, sources, new, part)
    rows, shape = known[0]
    if name in REDUCTIONS and (given.get("dim") is not None or (len(known) == 1 and len(new) < len(shape))):
        return reduced(rows, given, shape, new)
    if name in _LOSSES and len(new) < max(len(old) for _, old in known):
        return None
    if name in ELEMENTWISE or name in _ALIKE or name in _LOSSES or _is_pointwise(name):
        return agreed([_broadcast(rows, old, new) for rows, old in known if rows.axis is not None])
    if name in KEEP_ALL or rows.axis is None:
        return rows
    if name in ONE:
        return ONE[name](rows, given, shape, new)
    if name in PARTS:
        return PARTS[name](rows, given, shape, new, part)
    return _in_place(name, given, known, new)


@cache
def _is_pointwise(name: str) -> bool:
    """Whether torch itself says of all forms of an operation on tensors that they go element by element."""
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    forms = [getattr(packet, form) for form in packet.overloads()]
    of_tensors = [one for one in forms if any(str(given.type) == "Tensor" for given in one._schema.arguments)]
    return bool(of_tensors) and all(torch.Tag.pointwise in one.tags for one in of_tensors)


def _broadcast(rows: Rows, old: Shape, new: Shape) -> Rows:
    axis = axis_of(rows) + len(new) - len(old)
    if old[axis_of(rows)] == 1 < new[axis]:
        return along(axis, rows.of_entries(1).expand(new[axis]), rows.rows)
    return rows.at(axis)


def _sums_over(name: str, given: Arguments, from_end: int) -> bool:
    """Whether a layer makes its outputs from all entries, or neighbours, along an axis: of many rows at once."""
    if name not in CONVOLUTIONS | TRANSPOSED | {"convolution"}:
        return from_end == -1 and name in ("linear", "bilinear", "scaled_dot_product_attention")
    kernel = given["weight"].shape[2:]
    channels = -1 - len(kernel)
    return from_end == channels or (from_end > channels and kernel[from_end] > 1)


def _in_place(name: str, given: Arguments, known: Sequence[tuple[Rows, Shape]], new: Shape) -> Rows | None:
    """Of what keeps its batch axes where they are; None of everything that is not known to."""
    rows, shape = known[0]
    axis = axis_of(rows)
    if name not in _KEEP_AXES and not (name in _OF_MATRICES and axis < len(shape) - 2):
        return None
    if _sums_over(name, given, axis - len(shape)):
        return None
    if any(one.axis != axis or agreed([one, rows]) is None for one, other in known if len(other) == len(shape)):
        return None
    if axis >= len(new) or new[axis] != shape[axis]:
        return None
    return rows if len(new) == len(shape) or axis == 0 or name in _APPENDING else None
