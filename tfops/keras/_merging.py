"""Which batch norms of a model can go into the weights of the layer before or after them, for inference, and how."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfops.keras._activations import kind_of
from tfops.keras._attributes import held
from tfops.keras._folding import CLASSES, called, is_float, is_list, leading, name_of, nodes, parts_of

_CONVOLUTIONS = keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D
_DEPTHWISE = keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D
_SEPARABLE = keras.layers.SeparableConv1D, keras.layers.SeparableConv2D
_TRANSPOSED = keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose
_LINEAR = keras.layers.Dense, *_CONVOLUTIONS, *_DEPTHWISE, *_SEPARABLE, *_TRANSPOSED  # derived classes may do more


class Merge(NamedTuple):
    """The layer whose weights take a batch norm in; None, and `why`, if there is none."""

    norm: keras.Layer
    layer: Any = None
    follows: bool = True  # the batch norm follows the layer, or else comes before it
    activation: str | None = None  # the batch norm's own, which becomes the layer's
    why: str = ""  # a reason that batch norms have in common
    detail: str = ""

    def without(self, why: str, detail: str = "") -> Merge:
        """The batch norm by itself."""
        return Merge(self.norm, why=why, detail=detail)


class _Step(NamedTuple):
    """A call in a graph, or a place in a Sequential; what passes from one to the next has a key."""

    operation: Any
    reads: tuple[Any, ...]
    makes: tuple[Any, ...]
    has_residual: bool = False


class Merges:
    """The merges of a model.

    Attributes:
      of_norm: the merge of each batch norm that a graph or Sequential in the model calls, by its id.
      into: the merges of each layer that takes batch norms in, by its id.
    """

    def __init__(self, model: keras.Model):
        self.of_norm: dict[int, Merge] = {}
        self.into: dict[int, list[Merge]] = defaultdict(list)
        self._calls: dict[int, list[_Step]] = defaultdict(list)  # by the id of what is called
        self._makers: dict[Any, _Step] = {}
        self._readers: dict[Any, list[_Step]] = defaultdict(list)
        self._kept: set[Any] = set()  # outputs, and what is an attribute of a model
        self._training: set[int] = set()  # the ids of layers that are always called in training mode
        seen = set()
        for part in parts_of(model):
            for key, step in self._steps(part):
                if key not in seen:
                    seen.add(key)
                    self._add(step)
        for norm in [step.operation for steps in self._calls.values() for step in steps[:1]]:
            if type(norm) in CLASSES:
                merge = self.of_norm[id(norm)] = self._merge(norm)
                if merge.layer is not None:
                    self.into[id(merge.layer)].append(merge)

    def trains(self, norm: keras.Layer) -> bool:
        """Whether a call in training mode may be a part of the model."""
        return id(norm) in self._training or id(norm) not in self._calls

    def _steps(self, part: keras.Model) -> Iterator[tuple[Any, _Step]]:
        if is_list(part):
            for place, layer in enumerate(part.layers):
                key = id(part), place
                yield key, _Step(layer, ((id(part), place - 1),), (key,))
            self._kept.add((id(part), len(part.layers) - 1))
            return
        tensors = list(held(part, keras.KerasTensor))
        self._kept.update(map(id, tensors))
        for node in [*nodes(part), *leading(tensors)]:
            keywords = node.arguments.kwargs
            if isinstance(training := keywords.get("training"), (bool, int)) and training:
                self._training.update(map(id, called(node)))
            reads, makes = (tuple(map(id, each)) for each in (node.input_tensors, node.outputs))
            yield id(node), _Step(node.operation, reads, makes, keywords.get("residual") is not None)

    def _add(self, step: _Step) -> None:
        self._calls[id(step.operation)].append(step)
        self._makers.update(dict.fromkeys(step.makes, step))
        for key in step.reads:
            self._readers[key].append(step)

    def _merge(self, norm: keras.Layer) -> Merge:
        merge = Merge(norm)
        if not norm.built:
            return merge.without("it has no weights yet")
        if len(self._calls[id(norm)]) > 1:
            return merge.without("it is called several times")
        if id(norm) in self._training and norm.trainable:
            return merge.without("it is called with training=True")
        if norm.activity_regularizer is not None:
            return merge.without("it has an activity regularizer")
        (step,) = self._calls[id(norm)]
        activation = getattr(norm, "activation", None)
        before = self._into_previous(merge, step, activation)
        readers = self._readers[step.makes[0]]
        if before.layer is not None or step.has_residual or activation is not None or len(readers) != 1:
            return before
        after = readers[0].operation
        return before if type(after) not in _LINEAR else self._into_next(merge, step, after)

    def _into_previous(self, merge: Merge, step: _Step, activation: str | None) -> Merge:
        key = step.reads[0]
        maker = self._makers.get(key)
        # Older Keras has casts of inputs in its graphs.
        if maker is not None and kind_of(maker.operation) == "Cast" and not self._is_shared(key) and _is_float(merge):
            key = maker.reads[0]
            maker = self._makers.get(key)
        layer = None if maker is None else maker.operation
        if layer is None or type(layer) not in _LINEAR:
            name = "" if layer is None else name_of(layer)
            return merge.without("its input does not come from a convolution or dense layer", name)
        if layer.activation not in (None, keras.activations.linear):
            return merge.without("the layer before it has an activation", name_of(layer))
        if self._is_shared(key):
            return merge.without("the output of the layer before it is read elsewhere, too", name_of(layer))
        activation = None if step.has_residual else activation
        return self._checked(merge._replace(layer=layer, activation=activation))

    def _into_next(self, merge: Merge, step: _Step, layer: Any) -> Merge:
        if step.makes[0] in self._kept:
            return merge.without("its result is an output")
        if not _is_float(merge):
            return merge.without("its input is not of its dtype")
        if isinstance(layer, _TRANSPOSED) or (
            not isinstance(layer, keras.layers.Dense) and layer.padding != "valid" and max(layer.kernel_size) > 1
        ):
            return merge.without("the layer after it pads what it reads", name_of(layer))
        return self._checked(merge._replace(layer=layer, follows=False))

    def _is_shared(self, key: Any) -> bool:
        """Whether more than one call reads a value, or a user may."""
        return key in self._kept or len(self._readers[key]) > 1

    def _checked(self, merge: Merge) -> Merge:
        """The merge, if the layer can take it in."""
        norm, layer = merge.norm, merge.layer
        name, rank = name_of(layer), norm.input_spec.ndim
        if len(self._calls[id(layer)]) > 1:
            return merge.without("the layer that would take it in is called several times", name)
        if layer.activity_regularizer is not None:
            return merge.without("the layer that would take it in has an activity regularizer", name)
        if getattr(layer, "quantization_mode", None) is not None:
            return merge.without("the layer that would take it in is quantized", name)
        if norm.axis % rank != (1 if getattr(layer, "data_format", "") == "channels_first" else rank - 1):
            return merge.without("its axis is not that of the channels of the layer that would take it in", name)
        weights = merged_weights(layer, [*self.into.get(id(layer), ()), merge])
        if not all(np.isfinite(tf.cast(each, layer.compute_dtype)).all() for each in weights):
            return merge.without(f"its weights would not be finite in {layer.compute_dtype}", name)
        return merge


def _is_float(merge: Merge) -> bool:
    """Whether what the batch norm reads is."""
    return all(is_float(node.input_tensors[0]) for node in merge.norm._inbound_nodes)


def merged_weights(layer: keras.Layer, merges: list[Merge]) -> list[npt.NDArray[Any]]:
    """The weights of a layer with batch norms in them, in float64: the kernel or kernels, then the bias.

    With y = scale x + offset for a batch norm in inference, and K the layer's linear part with bias b:

        scale (K x + b) + offset = (scale K) x + scale b + offset
        K (scale x + offset) + b = (K scale) x + K offset + b
    """
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    weights = [_float64(store[str(place)]) for place in range(len(store))]
    *kernels, bias = weights if layer.use_bias else [*weights, np.zeros(())]
    with np.errstate(all="ignore"):
        for merge in merges:
            scale, offset = _coefficients(merge.norm)
            if merge.follows:
                kernels[-1] = kernels[-1] * _for_outputs(layer, kernels[-1], scale)
                bias = bias * scale + offset
            else:
                bias = bias + _linear(layer, kernels, offset)
                kernels[0] = kernels[0] * _for_inputs(layer, scale)
    return [*kernels, bias]


def _coefficients(norm: keras.Layer) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Of a batch norm in inference: y = scale x + offset."""
    mean, variance = _float64(norm.moving_mean), _float64(norm.moving_variance)
    scale = (_float64(norm.gamma) if norm.scale else 1.0) / np.sqrt(variance + norm.epsilon)
    return scale, (_float64(norm.beta) if norm.center else 0.0) - mean * scale


def _for_outputs(layer: keras.Layer, kernel: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A value for each output channel, as they lie in the (last) kernel."""
    if isinstance(layer, _TRANSPOSED):
        return values[:, None]
    return values.reshape(kernel.shape[-2:]) if isinstance(layer, _DEPTHWISE) else values


def _for_inputs(layer: keras.Layer, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A value for each input channel, as they lie in the (first) kernel."""
    if isinstance(layer, (keras.layers.Dense, *_DEPTHWISE, *_SEPARABLE)):
        return values[:, None]
    # A filter reads the channels of its group.
    return np.repeat(values.reshape(layer.groups, -1), layer.filters // layer.groups, axis=0).T


def _linear(layer: keras.Layer, kernels: list[npt.NDArray[Any]], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What the layer without bias gives for inputs that have the same value, of each channel, everywhere."""
    products = kernels[0] * _for_inputs(layer, values)
    sums: npt.NDArray[Any] = products.sum(axis=tuple(range(products.ndim - 2)))
    if not isinstance(layer, (*_DEPTHWISE, *_SEPARABLE)):  # which do not add up input channels
        sums = sums.sum(axis=0)
    sums = sums.reshape(-1)
    return np.matmul(sums, kernels[1].reshape(len(sums), -1)) if isinstance(layer, _SEPARABLE) else sums


def _float64(values: Any) -> npt.NDArray[Any]:
    return np.asarray(keras.ops.convert_to_numpy(values), np.float64)
