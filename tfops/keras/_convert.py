"""`tfops.keras.convert`: a model's batch norms replaced by tfops', or back."""

from __future__ import annotations

from typing import Literal

import keras

from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._compiling import compile_like
from tfops.keras._copying import Copier
from tfops.keras._reporting import describe

CLASSES = {"tfops": BatchNormalization, "keras": keras.layers.BatchNormalization}


def convert(
    model: keras.Model, to: Literal["tfops", "keras"] = "tfops", *, fold: bool = True, verbose: int = 1
) -> keras.Model:
    """A copy of the model with tfops' batch norms in place of Keras', and what follows them folded in; or back.

    Every `keras.layers.BatchNormalization`, but no class derived from it, becomes a `tfops.keras.BatchNormalization`:
    in functional and Sequential models, in models and layers inside them, and in subclassed models and layers. In
    functional models, whatever their class, and in models of class `keras.Sequential` itself, a batch norm also takes
    in

    - the addition that follows, `keras.layers.Add` of two tensors or `x + y`, if both are of one shape and dtype (where
      a dimension is not known, it is taken to be the same);
    - then, or at once, the activation that follows, if it is one that `tfops.fused_batch_norm` has (no
      PReLU), as one of Keras' layers or operations (in a Sequential model the
      activation alone)

    where nothing else reads what comes before, and that is not an output of the model, nor an attribute of it. Then the
    batch norm computes at once

        activation((x - mean) / sqrt(variance + epsilon) * gamma + beta + residual)

    Nothing is folded where the graph cannot be seen: in subclassed models and layers, classes derived from
    `keras.Sequential`, and models inside wrappers such as `TimeDistributed`.

    **What the copy has.** The given model is left as it is. The copy has the same layers and operations in the same
    order, with the same names, weights, paths, values, `trainable` and RematScope. So weights files, `.keras` files,
    lists of weights and checkpoints go from one to the other. In the place of what was folded in, a `FoldedLayer` or
    `FoldedOperation` passes on what the batch norm has computed.

    What is no longer computed cannot be read: the `output` of a batch norm or addition whose result is only there after
    a later layer raises ValueError, and says which layer's output is there. Nor can other layers read it: a clone in
    which one takes the place of a stand-in raises ValueError when it is made. In a functional model what is folded is
    its calls: layers that are called by hand do what they did. In a Sequential model it is the layers: there a batch
    norm applies the activation wherever it is called, so that `copy.layers[0](x)`, `copy.pop()` and other models made
    of some of its layers have the activation with the batch norm; `fold=False` keeps them apart.

    **Compiled models.** If the model is compiled, so is the copy: with the same losses, with metrics of its own, and
    with an optimizer of its own in the same state, however deep that is wrapped. Optimizers and metrics are copied by
    their configs. A `compile` of the class' own is called with what the model is compiled with, or its
    `compile_from_config`, if it has one. Where that cannot be, a warning says what is to be done by hand. All is made
    under the model's `tf.distribute` strategy.

    **Models of your own class.** A functional model keeps its class, its methods and its attributes: the graph is
    copied, without calling the class' constructor. Models whose class overrides `call`, other subclassed models, and
    layers are copied by `from_config(get_config())`, while their classes get tfops' layer where they construct Keras';
    public attributes of numbers, strings and containers of these that the config does not hold come along. So do the
    states of optimizers and metrics that are attributes, or a warning says which begin anew. When a model that has a
    config of its own is saved and loaded, that config makes Keras' batch norms, with the right weights: convert it
    again.

    Every copy is checked: its variables are compared, and its outputs in inference, on random inputs of one element, if
    the model can be called on such.

    Args:
        model: Any Keras model.
        to: "tfops", or "keras" for the way back: every `tfops.keras.BatchNormalization` becomes Keras' own, and what
            was folded in is what it was. What was fused without `convert` becomes an `Add` and an `Activation` after
            it, whose names are the batch norm's with "_add" and, for instance, "_relu".
        fold: Whether batch norms take in anything. False also takes out what has been folded into the given model.
        verbose: 0 prints nothing. 1 prints a line that says how many batch norms were replaced, what was folded in, and
            why others are alone. 2 prints also a line for each of them, with names.

    Returns:
        A model of the same class.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: `to` or `verbose` is none of the above; a layer or the model cannot be copied by its config; the
            copy has other variables or other outputs, because the config does not tell all; or, with to="keras", a
            batch norm with a fused activation is inside a subclassed model or layer, or the layers that it becomes
            would change the order in which Keras makes the calls of a layer that has several.

    Examples:
        >>> import keras
        >>> import tfops
        >>> inputs = keras.Input([8, 8, 16])
        >>> y = keras.layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs)
        >>> y = keras.layers.BatchNormalization(name="norm")(y)
        >>> y = keras.layers.ReLU(name="relu")(keras.layers.Add(name="add")([y, inputs]))
        >>> model = keras.Model(inputs, y, name="block")
        >>> fused = tfops.keras.convert(model)
        block: 1 batch norm replaced: 1 with addition and ReLU
        >>> isinstance(fused.get_layer("norm"), tfops.keras.BatchNormalization)
        True
        >>> stock = tfops.keras.convert(fused, to="keras")
        block: 1 batch norm replaced: 1 that had addition and ReLU
        >>> type(stock.get_layer("norm")) is keras.layers.BatchNormalization
        True
    """
    check_arguments(model, verbose)
    if to not in CLASSES:
        raise ValueError(f"to must be one of {', '.join(map(repr, CLASSES))}, but it is {to!r}")
    copier = Copier(model, CLASSES[to], fold)
    copy, reports = copier.run()
    compile_like(model, copy, copier.variables)
    if verbose:
        print(describe(model.name, to, reports, verbose > 1))
    return copy


def check_arguments(model: keras.Model, verbose: int) -> None:
    """Raises an error that names what is wrong."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, but it is {model!r}")
    if verbose not in (0, 1, 2):
        raise ValueError(f"verbose must be 0, 1 or 2, but it is {verbose!r}")
