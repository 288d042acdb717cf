"""A Keras model's batch norms replaced by tfops', with the addition and the activation after them folded in."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import keras

import tfops.keras


class Folds(NamedTuple):
    """What goes into batch norms. All by layer name."""

    additions: dict[str, tuple[str, int]]  # Add: the batch norm that takes it in, and which of the two inputs that is
    activations: dict[str, str]  # ReLU or Activation: the batch norm that takes it in


def plan_folds(model: keras.Model) -> Folds:
    """What can be folded in a functional model whose layers are called once each.

    A batch norm takes in an Add of two tensors of one shape, then a ReLU, ReLU6 or SiLU, or either alone, where nothing
    else reads what comes before. Of two batch norms that are added, the second takes the Add in.
    """
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    uses = Counter(id(tensor) for layer in layers for tensor in keras.tree.flatten(layer.input))
    uses.update(map(id, model.outputs))
    norms = {id(layer.output): layer.name for layer in layers if is_norm(layer) and uses[id(layer.output)] == 1}
    ends = dict(norms)  # tensors that an activation may be applied to, with the batch norm that makes them
    additions, activations = {}, {}
    for layer in layers:  # in the order of computation
        if isinstance(layer, keras.layers.Add) and [x.shape for x in layer.input[1:]] == [layer.input[0].shape]:
            side = 1 if id(layer.input[1]) in norms else 0
            if norm := norms.get(id(layer.input[side])):
                additions[layer.name] = norm, side
                if uses[id(layer.output)] == 1:
                    ends[id(layer.output)] = norm
        elif activation_name(layer) and (norm := ends.get(id(layer.input))):
            activations[layer.name] = norm
    return Folds(additions, activations)


def is_norm(layer: keras.Layer) -> bool:
    """Whether the layer is Keras' own batch norm, not one derived from it."""
    return type(layer) is keras.layers.BatchNormalization


def activation_name(layer: keras.Layer) -> str | None:
    """tfops' name of what an activation layer applies; None if it has none, or the layer is of another kind."""
    if isinstance(layer, keras.layers.Activation):
        name = keras.activations.serialize(layer.activation)
        return name if name in ("relu", "relu6", "silu") else None
    if isinstance(layer, keras.layers.ReLU) and not layer.negative_slope and not layer.threshold:
        return {None: "relu", 6: "relu6"}.get(layer.max_value)
    return None


def fuse(model: keras.Model, folds: Folds) -> keras.Model:
    """A model like `model` with tfops' batch norms and `folds` in them. Layers keep their names; weights are new."""
    deferred = {norm for norm, _ in folds.additions.values()}
    activations = {norm: activation_name(model.get_layer(name)) for name, norm in folds.activations.items()}
    norms: dict[str, keras.Layer] = {}

    def clone(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if not is_norm(layer):
            return layer.__class__.from_config(config)
        config["activation"] = activations.get(layer.name)
        norms[layer.name] = tfops.keras.BatchNormalization.from_config(config)
        return norms[layer.name]

    def call(layer: keras.Layer, inputs: Any, **arguments: Any) -> Any:
        if layer.name in folds.activations or layer.name in deferred:
            return inputs  # the addition calls a deferred batch norm: its other input need not be there before
        if layer.name in folds.additions:
            norm, side = folds.additions[layer.name]
            return norms[norm](inputs[side], residual=inputs[1 - side])
        return layer(inputs, **arguments)

    return keras.models.clone_model(model, clone_function=clone, call_function=call)
