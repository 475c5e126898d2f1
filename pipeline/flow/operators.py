"""What each tensor operation is to the census: a view, an elementwise map, a pool, a norm, an affine map.

Layer 1; knows operations, never tensors' values. Operations are seen below inference mode, where composite ones
(linear, batch_norm, einsum, lstm) arrive whole, the same for modules, functional code and exported programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


def words(text: str) -> frozenset[str]:
    """A set of names, written as one text.

    >>> sorted(words("add mul"))
    ['add', 'mul']
    """
    return frozenset(text.split())


# Rearrange elements without changing any: a unit's numbers stay that unit's numbers.
VIEWS = words(
    "view reshape reshape_as flatten unflatten transpose permute t numpy_T mT H mH adjoint squeeze unsqueeze select "
    "slice narrow chunk split split_with_sizes unbind unsafe_chunk unsafe_split unsafe_split_with_sizes tensor_split "
    "expand expand_as broadcast_to contiguous clone detach alias to _to_copy type_as view_as swapaxes swapdims "
    "movedim moveaxis _unsafe_view _reshape_alias ravel lift_fresh positive unsqueeze_ squeeze_ transpose_ detach_ "
    "pin_memory hsplit vsplit dsplit diagonal unfold as_strided"
)
# Identity in eval mode.
DROPOUTS = words("dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout")
# Elementwise nonlinear functions of one tensor: a unit's gate.
NONLINEAR = words(
    "relu relu6 leaky_relu prelu _prelu_kernel rrelu rrelu_with_noise elu selu celu gelu silu mish sigmoid tanh "
    "softplus hardtanh hardsigmoid hardswish hardshrink softshrink threshold log_sigmoid exp expm1 log log1p square "
    "pow abs erf erfc sin cos sqrt rsqrt reciprocal sign clamp clamp_min clamp_max clip tanhshrink special_expit round "
    "floor ceil trunc sinh cosh atan asinh arctan logit heaviside special_erf sinc "
    "nan_to_num glu_jvp log2 exp2 special_entr sgn tan"
)
# Elementwise functions that are linear in their tensor argument when the other argument is a constant.
LINEAR_ELEMENTWISE = words("add sub mul div neg rsub true_divide subtract multiply divide negative")
ELEMENTWISE = (
    NONLINEAR
    | LINEAR_ELEMENTWISE
    | words(
        "maximum minimum max min where lerp addcmul addcdiv gt ge lt le eq ne logical_and logical_or logical_not "
        "masked_fill fmod remainder atan2 hypot logaddexp bitwise_and bitwise_or bitwise_not isnan isinf isfinite "
        "xlogy floor_divide float_power"
    )
)
# New tensors of the shape of another, without its content.
LIKES = words(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty "
    "new_empty_strided randint_like"
)
# Make a tensor larger without anything new in it.
REPEATS = words("expand expand_as broadcast_to repeat stack")
# Put tensors one after another.
JOINS = words("cat concat concatenate stack")
# How a tensor made of Python numbers enters.
FRESH = words("lift_fresh lift detach")
POOLS = words(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d amax"
)
# Norms whose statistics come from the data itself.
DATA_NORMS = words("layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm")
# Norms by running statistics of each channel; those of decomposed programs return them too.
BATCH_NORMS = words("batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training")
# Composite operations that are followed piece by piece where a parameter takes part.
COMPOSITE = words("tensordot inner linalg_multi_dot chain_matmul")
CONVOLUTIONS = words("conv1d conv2d conv3d")
TRANSPOSED = words("conv_transpose1d conv_transpose2d conv_transpose3d")
# Affine maps that say which of their operands is fed to the other.
LAYERS = CONVOLUTIONS | TRANSPOSED | words("linear convolution")


@dataclass(frozen=True, slots=True)
class Operator:
    """What an ATen overload is: `name` without namespace and in-place underscore, `writes` the arguments
    that it changes."""

    name: str
    arguments: tuple[str, ...]
    writes: tuple[int, ...]
    written_keywords: tuple[str, ...]

    @property
    def is_view(self) -> bool:
        """Whether it only rearranges elements."""
        return self.name in VIEWS


@cache
def operator(func: torch._ops.OpOverload) -> Operator:
    """Describe an overload, once per overload."""
    schema = func._schema
    writes: list[int] = []
    keywords: list[str] = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if argument.kwarg_only:
                keywords.append(argument.name)
            else:
                writes.append(index)
    namespace, name = schema.name.split("::")
    in_place = name.endswith("_") and not name.endswith("__") and bool(writes)
    if namespace != "aten":
        name = f"{namespace}::{name}"
    arguments = tuple(argument.name for argument in schema.arguments)
    return Operator(name[:-1] if in_place else name, arguments, tuple(writes), tuple(keywords))
