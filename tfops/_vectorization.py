"""What `tf.vectorized_map`, jacobians and Hessians make of the ops: one call in place of a loop of calls.

TensorFlow converts the body of such a loop op by op, and asks a converter for the op that does all iterations at once.
Inputs that differ from one iteration to another come stacked along a new first dimension. Here that dimension becomes
part of the channels, which are independent of one another: iteration i's channel c is channel i * C + c. Where all
outputs are elementwise and the vectors [C] are the same for all iterations, it simply remains, as one more dimension of
the batch.
"""

from __future__ import annotations

import contextlib
from typing import Any

import tensorflow as tf
from tensorflow.python.ops.parallel_for import pfor  # there is no public way to register a converter

from tfops import _gpus
from tfops._activations import is_piecewise_linear
from tfops._folding import Folding
from tfops._library import ops

_OPS = {
    "Tfops>BatchNormTraining": ops.tfops_batch_norm_training,
    "Tfops>BatchNormTrainingGrad": ops.tfops_batch_norm_training_grad,
    "Tfops>BatchNormInference": ops.tfops_batch_norm_inference,
    "Tfops>BatchNormInferenceGrad": ops.tfops_batch_norm_inference_grad,
    "Tfops>BatchNormMoments": ops.tfops_batch_norm_moments,
    "Tfops>BatchNormGradientMoments": ops.tfops_batch_norm_gradient_moments,
    "Tfops>BatchNormGradientNormalize": ops.tfops_batch_norm_gradient_normalize,
}
# All other inputs and outputs of the ops are vectors of [C].
_DATA = {"x", "dy", "residual", "y", "dx", "dresidual"}
_ROWS = {"keep"}
_MASK = {"mask"}
_STATISTICS = {"saved_mean", "saved_inv_std"}  # with virtual batches one for each


def _names(arguments: Any, op: tf.Operation) -> list[str]:
    """The name of each input or output; those of a list have that of the list."""
    return [each.name for each in arguments for _ in range(op.get_attr(each.number_attr) if each.number_attr else 1)]


def _call(op: tf.Operation, inputs: list[tf.Tensor], **changed: Any) -> list[tf.Tensor]:
    """The same op with other inputs, and attributes but for those that follow from these."""
    arguments = op.op_def.input_arg
    implied = {each.type_attr for each in arguments} | {each.number_attr for each in arguments}
    keywords = {each.name: op.get_attr(each.name) for each in op.op_def.attr if each.name not in implied}
    remaining = iter(inputs)
    for each in arguments:
        taken = [next(remaining) for _ in range(op.get_attr(each.number_attr) if each.number_attr else 1)]
        keywords[each.name] = taken if each.number_attr else taken[0]
    with _gpus.beside_forward():
        outputs = _OPS[op.type](**{**keywords, **changed})
    return [outputs] if isinstance(outputs, tf.Tensor) else list(outputs)


def _convert(pfor_input: Any) -> list[Any]:
    op = pfor_input.op
    names, results = _names(op.op_def.input_arg, op), _names(op.op_def.output_arg, op)
    place = names.index("x")
    axis, rank = op.get_attr("axis"), op.inputs[place].shape.rank
    if rank is None:
        raise pfor.ConversionNotImplementedError(f"x of {op.name} has an unknown rank")
    elementwise = _DATA | _ROWS
    stacked = {name for name, each in zip(names, pfor_input.inputs, strict=True) if each.is_stacked}
    if stacked <= elementwise and elementwise.issuperset(results):
        pfor_input.stack_inputs([i for i, name in enumerate(names) if name in elementwise])
        outputs = _call(op, [each.t for each in pfor_input.inputs], axis=axis % rank + 1)
        return [pfor.wrap(y, not _is_missing(name, op)) for name, y in zip(results, outputs, strict=True)]

    pfor_input.stack_inputs()
    size = op.get_attr("virtual_batch_size") if "virtual_batch_size" in op.node_def.attr else 0
    has_mask = is_piecewise_linear(_activation_with_residual(op))
    folding = Folding(pfor_input.stacked_input(place), axis, has_mask, size)
    inputs = [_of_kind(folding, "fold", name)(each.t) for name, each in zip(names, pfor_input.inputs, strict=True)]
    outputs = _call(op, inputs, axis=folding.axis)
    return [
        pfor.wrap(y, False) if _is_missing(name, op) else pfor.wrap(_of_kind(folding, "unfold", name)(y), True)
        for name, y in zip(results, outputs, strict=True)
    ]


def _of_kind(folding: Folding, what: str, name: str) -> Any:
    kinds = {"data": _DATA, "rows": _ROWS, "mask": _MASK, "statistics": _STATISTICS}
    kind = next((kind for kind, names in kinds.items() if name in names), "vector")
    return getattr(folding, f"{what}_{kind}")


def _is_missing(name: str, op: tf.Operation) -> bool:
    """Whether the output is an empty vector, for the residual has no gradient of its own."""
    return name == "dresidual" and not _activation_with_residual(op)


def _activation_with_residual(op: tf.Operation) -> str:
    """The op's activation if it has a residual too, else ""."""
    attributes = op.node_def.attr
    told = [name for name in ("has_residual", "num_residuals") if name in attributes]
    return tf.compat.as_str(op.get_attr("activation")) if told and op.get_attr(told[0]) else ""


for _type in _OPS:
    with contextlib.suppress(AssertionError):  # TensorFlow keeps the first registration: the module is imported again
        pfor.RegisterPFor(_type)(_convert)
