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

from tfops import _gpus, _mask
from tfops._activations import is_piecewise_linear
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


class _Folding:
    """Stacked tensors, [iterations, ...], as those of one call, and back.

    Data become [outer, iterations * C, inner / last, last], where `last` is x's last dimension, or 1 if that has the
    channels: so flags for rows of x's last dimension, `keep`, have a place.
    """

    def __init__(self, x: tf.Tensor, axis: int, has_mask: bool):
        self._has_mask = has_mask
        rank = x.shape.rank - 1
        axis %= rank
        self._axis_is_last = axis == rank - 1
        shape = tf.shape(x)
        self._shape = shape
        self._iterations, self._channels = shape[0], shape[1 + axis]
        self._outer = tf.reduce_prod(shape[1 : 1 + axis])
        self._inner = tf.reduce_prod(shape[2 + axis :])
        self._last = tf.constant(1) if self._axis_is_last else shape[-1]

    def _exchange(self, x: tf.Tensor, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        """[first, second, C, inner], of whatever shape, as [second, first, C, inner]."""
        return tf.transpose(tf.reshape(x, tf.stack([first, second, self._channels, self._inner])), [1, 0, 2, 3])

    def fold_data(self, x: tf.Tensor) -> tf.Tensor:
        folded = self._exchange(x, self._iterations, self._outer)
        rows = self._inner // tf.maximum(self._last, 1)
        return tf.reshape(folded, tf.stack([self._outer, self._iterations * self._channels, rows, self._last]))

    def unfold_data(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reshape(self._exchange(x, self._outer, self._iterations), self._shape)

    def fold_vector(self, v: tf.Tensor) -> tf.Tensor:
        return tf.reshape(v, [-1])

    def unfold_vector(self, v: tf.Tensor) -> tf.Tensor:
        return tf.reshape(v, tf.stack([self._iterations, self._channels]))

    def fold_rows(self, keep: tf.Tensor) -> tf.Tensor:
        rows = self._inner // tf.maximum(self._last, 1)
        channels = 1 if self._axis_is_last else self._channels
        folded = tf.transpose(tf.reshape(keep, tf.stack([self._iterations, self._outer, channels, rows])), [1, 0, 2, 3])
        folded = tf.broadcast_to(folded, tf.stack([self._outer, self._iterations, self._channels, rows]))
        return tf.reshape(folded, tf.stack([self._outer, self._iterations * self._channels, rows]))

    def _rows_of_bits(self) -> tuple[tf.Tensor, tf.Tensor]:
        """How many bits a row of an iteration's mask has, and one of the call's."""
        return (
            _mask.row_length(self._outer, self._channels, self._inner),
            _mask.row_length(self._outer, self._iterations * self._channels, self._inner),
        )

    def fold_mask(self, mask: tf.Tensor) -> tf.Tensor:
        mask = tf.reshape(mask, [-1])
        if not self._has_mask:  # it is empty
            return mask
        row, folded_row = self._rows_of_bits()
        return _mask.pack(self._exchange(_mask.unpack(mask, row), self._iterations, self._outer), folded_row)

    def unfold_mask(self, mask: tf.Tensor) -> tf.Tensor:
        if not self._has_mask:
            return tf.zeros(tf.stack([self._iterations, 0]), tf.uint8)
        row, folded_row = self._rows_of_bits()
        bits = self._exchange(_mask.unpack(mask, folded_row), self._outer, self._iterations)
        # Bytes are counted by hand: there may be no iteration to divide them by.
        rows = self._outer * self._channels * self._inner // row
        return tf.reshape(_mask.pack(bits, row), tf.stack([self._iterations, rows * ((row + 7) // 8)]))


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
    folding = _Folding(pfor_input.stacked_input(place), axis, is_piecewise_linear(_activation_with_residual(op)))
    inputs = [_of_kind(folding, "fold", name)(each.t) for name, each in zip(names, pfor_input.inputs, strict=True)]
    outputs = _call(op, inputs, axis=1)
    return [
        pfor.wrap(y, False) if _is_missing(name, op) else pfor.wrap(_of_kind(folding, "unfold", name)(y), True)
        for name, y in zip(results, outputs, strict=True)
    ]


def _of_kind(folding: _Folding, what: str, name: str) -> Any:
    kinds = {"data": _DATA, "rows": _ROWS, "mask": _MASK}
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
