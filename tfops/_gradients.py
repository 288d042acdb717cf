"""Gradients of the ops: the first by the gradient ops, those of the gradient ops by formulas in plain TensorFlow.

The formulas are written out (`_second_derivatives.py`), not left to a tape: TensorFlow may call these functions while
no tape records, as it does for forward mode through a function. They consist of TensorFlow's own operations, so whoever
differentiates twice is free to differentiate again. The phases' first gradient is that of `_phases.normalize`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfops import _gpus, _virtual_batches
from tfops import _second_derivatives as second
from tfops._activations import Inverse, is_piecewise_linear
from tfops._arguments import param_type, value_of
from tfops._library import ops

_Gradient = Callable[..., list[Any]]
_SHARED = ("axis", "epsilon", "epsilon_bits", "activation")
_TRAINING = ("exponential_avg_factor", "exponential_avg_factor_bits", "unbiased", "virtual_batch_size", "in_place")


def _register(op_type: str) -> Callable[[_Gradient], _Gradient]:
    """tf.RegisterGradient, but for a module that is imported again: TensorFlow keeps its first registration."""

    def register(function: _Gradient) -> _Gradient:
        with contextlib.suppress(KeyError):
            tf.RegisterGradient(op_type)(function)
        return function

    return register


def _attributes(op: tf.Operation, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: op.get_attr(name) for name in names}
    values["activation"] = tf.compat.as_str(values["activation"])  # which is bytes in graphs
    return values


def _split(lists: list[Any]) -> tuple[list[Any], list[Any]]:
    """An op's last inputs: none or two vectors, and no residual or one. Its attributes say so too, but take longer."""
    vectors = len(lists) // 2 * 2
    return lists[:vectors], lists[vectors:]


def _is_zero(gradient: Any) -> bool:
    """Whether this is known without a look at a tensor's memory, as of what graphs put in the place of no gradient."""
    if gradient is None or getattr(gradient, "op", None) is None:
        return gradient is None
    value = tf.get_static_value(gradient)
    return gradient.op.type == "ZerosLike" or (value is not None and not value.any())


def _with_inv_std(
    attributes: dict[str, Any], y: Any, inv_std: Any, dmean: Any, dvariance: Any, dinv_std: Any
) -> list[tf.Tensor]:
    """The gradients of mean and variance, for a factor of 1, with that of saved_inv_std in them: one of the variance.

    Only the gradient of an in-place gradient brings one: otherwise it is in the gradient of x.
    """
    factor = value_of(attributes, "exponential_avg_factor")
    n = tf.maximum(second.Layout(y, attributes["axis"], inv_std.dtype).count, 1)
    bessel = tf.maximum(n - 1, 1) / n if attributes["unbiased"] else 1.0
    return [factor * dmean, factor * dvariance - 0.5 * bessel * inv_std**3 * dinv_std]


@_register("Tfops>BatchNormTraining")
def _training_grad(
    op: tf.Operation, dy: Any, dmean: Any, dvariance: Any, _: Any = None, dinv_std: Any = None, *__: Any
) -> list[Any]:
    x, scale, offset, *rest = op.inputs
    running, residual = _split(rest)
    y, _, _, saved_mean, saved_inv_std, mask = op.outputs
    attributes = _attributes(op, _SHARED + _TRAINING)
    kept = 1.0 - value_of(attributes, "exponential_avg_factor")
    needs_residual = residual and attributes["activation"] and not is_piecewise_linear(attributes["activation"])
    drunning = [dmean, dvariance]
    if attributes["in_place"]:
        x = y  # and so x itself is not kept
        if not _is_zero(dinv_std):
            drunning = _with_inv_std(attributes, y, saved_inv_std, dmean, dvariance, dinv_std)
            attributes |= {"exponential_avg_factor": 1.0, "exponential_avg_factor_bits": 0}
    with _gpus.beside_forward():
        dx, dscale, doffset, dresidual = ops.tfops_batch_norm_training_grad(
            dy,
            x,
            scale,
            offset,
            saved_mean,
            saved_inv_std,
            mask,
            drunning=drunning,
            residual=residual if needs_residual else [],
            has_residual=bool(residual),
            **attributes,
        )
    gradients = [dx, dscale, doffset]
    if running:
        # A tape tells which inputs it has no use for: most often these.
        unused = getattr(op, "skip_input_indices", None) or ()
        for i, gradient in ((3, dmean), (4, dvariance)):
            if i in unused:
                gradients.append(None)
            else:  # where nothing is kept of them, they may be empty
                gradients.append(kept * gradient if kept else tf.zeros_like(op.inputs[i]))
    if residual:
        gradients.append(dresidual if attributes["activation"] else dy)
    return gradients


@_register("Tfops>BatchNormInference")
def _inference_grad(op: tf.Operation, dy: Any) -> list[Any]:
    x, scale, offset, mean, variance, *residual = op.inputs
    attributes = _attributes(op, _SHARED)
    graph = getattr(op.outputs[0], "graph", None)  # eager tensors have none
    if graph is not None and graph.building_function:  # in a session's graph, what has run may not be changed
        # For csrc/tensorflow/xla.cc: x is needed later, and XLA must not have y in its buffer.
        op.outputs[0].op._set_attr("_tfops_has_gradient", tf.compat.v1.AttrValue(b=True))
    gradients: list[Any]
    with _gpus.beside_forward():
        *gradients, dresidual = ops.tfops_batch_norm_inference_grad(
            dy,
            x,
            scale,
            offset,
            mean,
            variance,
            residual=residual if attributes["activation"] else [],
            has_residual=bool(residual),
            **attributes,
        )
    if residual:
        gradients.append(dresidual if attributes["activation"] else dy)
    return gradients


# ----------------------------------------------------------------------------------------------------------------------
# The gradient ops.


def _wide(tensors: Any, dtype: tf.DType) -> list[tf.Tensor]:
    """All in the type that the formulas are computed in; a gradient may be the slices that someone took."""
    return [tf.cast(tf.convert_to_tensor(tensor), dtype) for tensor in tensors]


def _like(gradients: list[tf.Tensor], inputs: list[tf.Tensor]) -> list[tf.Tensor]:
    return [tf.cast(gradient, tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True)]


def _has_dresidual(op: tf.Operation, attributes: dict[str, Any]) -> bool:
    """Whether the op's last output is one: it is empty otherwise."""
    return bool(op.get_attr("has_residual") and attributes["activation"])


def _normalization(attributes: dict[str, Any], *inputs: Any) -> second.Normalization:
    epsilon = value_of(attributes, "epsilon")
    return second.Normalization(attributes["axis"], epsilon, attributes["activation"], *inputs)


@_register("Tfops>BatchNormTrainingGrad")
def _training_grad_grad(op: tf.Operation, *upstream: Any) -> list[Any]:
    *inputs, _, _, mask = op.inputs[:7]
    drunning, residual = _split(op.inputs[7:])
    attributes = _attributes(op, _SHARED + _TRAINING)
    if attributes["in_place"]:
        return _in_place_grad_grad(attributes, inputs, op.inputs[5], drunning, upstream)
    has_dresidual = _has_dresidual(op, attributes)
    param = param_type(inputs[0].dtype)
    wide_residual = _wide(residual, param)
    gradients = _virtual_batches.second_derivatives(
        attributes["virtual_batch_size"],
        _normalization(attributes, *_wide(inputs, param), None, None, wide_residual[0] if residual else None),
        mask if has_dresidual and not residual else None,
        drunning,
        _wide(upstream if has_dresidual else upstream[:-1], param),
        value_of(attributes, "exponential_avg_factor"),
        attributes["unbiased"],
    )
    gradients = _like(gradients, [*inputs, *drunning, *residual])
    # saved_mean and saved_inv_std are functions of x here: their share is in x's gradient.
    return [*gradients[:4], None, None, None, *gradients[4:]]


def _in_place_grad_grad(
    attributes: dict[str, Any], inputs: list[tf.Tensor], inv_std: tf.Tensor, drunning: list[tf.Tensor], upstream: Any
) -> list[Any]:
    """saved_inv_std is an input like others here: what it has of x reaches x through the forward op."""
    param = param_type(inputs[0].dtype)
    gradients = second.training_in_place(
        Inverse(attributes["activation"], inputs[1].dtype),
        attributes["axis"],
        [*_wide(inputs, param), inv_std],
        drunning,
        _wide(upstream[:3], param),
        value_of(attributes, "exponential_avg_factor"),
        attributes["unbiased"],
    )
    gradients = _like(gradients, [*inputs, inv_std, *drunning])
    return [*gradients[:4], None, gradients[4], None, *gradients[5:]]


@_register("Tfops>BatchNormInferenceGrad")
def _inference_grad_grad(op: tf.Operation, *upstream: Any) -> list[Any]:
    attributes = _attributes(op, _SHARED)
    param = param_type(op.inputs[0].dtype)
    inputs = _wide(op.inputs, param)
    of_outputs = _wide(upstream if _has_dresidual(op, attributes) else upstream[:-1], param)
    gradients = second.inference(
        _normalization(attributes, *inputs[:6], inputs[6] if inputs[6:] else None),
        [*of_outputs, None][:6],
    )
    return _like(gradients, list(op.inputs))


# ----------------------------------------------------------------------------------------------------------------------
# The phases by themselves.


def _kept(op: tf.Operation, dtype: tf.DType) -> tf.Tensor | float:
    """The input `keep` as factors."""
    keeps = op.get_attr("num_keeps")
    if not keeps:
        return 1.0
    keep = op.inputs[1 if op.type == "Tfops>BatchNormMoments" else 8]
    return tf.cast(keep, dtype)[..., None]


@_register("Tfops>BatchNormMoments")
def _moments_grad(op: tf.Operation, _: Any, dmean: Any, dvariance: Any) -> list[Any]:
    x = op.inputs[0]
    count, mean, _ = op.outputs
    wide = tf.cast(x, count.dtype)
    layout = second.Layout(wide, op.get_attr("axis"))
    shift = layout.vector(tf.math.divide_no_nan(dmean, count))
    tilt = layout.vector(tf.math.divide_no_nan(2 * dvariance, count))
    dx = _kept(op, wide.dtype) * ((wide - layout.vector(mean)) * tilt + shift)
    return [tf.cast(dx, x.dtype)] + [None] * op.get_attr("num_keeps")


@_register("Tfops>BatchNormGradientMoments")
def _gradient_moments_grad(op: tf.Operation, *upstream: Any) -> list[Any]:
    param = param_type(op.inputs[0].dtype)
    inputs = _wide(op.inputs, param)
    gradients = second.inference(
        _normalization(_attributes(op, _SHARED), *inputs[:6], inputs[6] if inputs[6:] else None),
        [None, *_wide(upstream, param), None],
    )
    return _like(gradients, list(op.inputs))


@_register("Tfops>BatchNormGradientNormalize")
def _gradient_normalize_grad(op: tf.Operation, *upstream: Any) -> list[Any]:
    attributes = _attributes(op, _SHARED)
    keeps, residuals = op.get_attr("num_keeps"), op.get_attr("num_residuals")
    arguments = [*op.inputs[:8], *op.inputs[8 + keeps :]]
    param = param_type(op.inputs[0].dtype)
    inputs = _wide(arguments, param)
    has_dresidual = residuals and attributes["activation"]
    gradients = second.gradient_normalize(
        _normalization(attributes, *inputs[:6], inputs[8] if residuals else None),
        inputs[6],
        _kept(op, param),
        *(_wide(upstream, param) if has_dresidual else [*_wide(upstream[:1], param), None]),
    )
    gradients = _like(gradients, arguments)
    return [*gradients[:8], *[None] * keeps, *gradients[8:]]
