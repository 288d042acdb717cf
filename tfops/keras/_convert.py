"""`tfops.keras.convert`: a model's batch norms replaced by tfops', or back."""

from __future__ import annotations

import warnings

import keras

from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._copying import Copier
from tfops.keras._reporting import describe

CLASSES = {"tfops": BatchNormalization, "keras": keras.layers.BatchNormalization}


def convert(model: keras.Model, to: str = "tfops", *, fold: bool = True, verbose: int = 1) -> keras.Model:
    """A copy of the model with tfops' batch norms in place of Keras', and what follows them folded in; or back.

    Every `keras.layers.BatchNormalization`, but no class derived from it, becomes a `tfops.keras.BatchNormalization`:
    in functional and Sequential models, in models and layers inside them, and in subclassed models and layers. In
    functional and Sequential models a batch norm also takes in

    - the addition that follows, `keras.layers.Add` of two tensors or `x + y`, if both are of one shape and dtype (where
      a dimension is not known, it is taken to be the same);
    - then, or at once, the activation that follows: relu, relu6, leaky_relu with a slope of 0.2, or silu, as one of
      Keras' layers or operations,

    where nothing else reads what comes before, and that is not an output of the model. A layer that is called several
    times takes in the same at every call, or nothing. In a model with several outputs, the layers that make these
    stay, because losses and metrics go by their names.

    The given model is left as it is. The copy's layers have the same names (those that were folded in are gone), its
    weights the same names, paths, values and `trainable`. If the model is compiled, so is the copy, with the same state
    of the optimizer; if that cannot be, a warning says so. Where additions are folded in, `copy.weights` may be in
    another order.

    Subclassed models and layers are copied by `from_config(get_config())`, while their classes get tfops' layer where
    they construct Keras'. When such a model is saved and loaded, it has Keras' batch norms: convert it again.

    Args:
      model: any Keras model.
      to: "tfops", or "keras" for the way back: every `tfops.keras.BatchNormalization` becomes Keras' own, followed by
        an `Add` and an `Activation` for what was fused in it. Their names are the batch norm's with "_add" and, for
        instance, "_relu".
      fold: whether batch norms take in anything. Without, all layers remain, and weights are in the same order.
      verbose: 0 prints nothing; 1 a line that says how many batch norms were replaced and what was folded in; 2 also
        a line for each of them, with the names of what was folded in, or why nothing was.

    Returns:
      a model of the same class.

    Raises:
      TypeError: model is not a Keras model.
      ValueError: to or verbose is none of the above; a layer or the model cannot be copied by its config, or the copy
        has other variables, because the config does not tell all; or, with to="keras", a batch norm with a fused
        activation is inside a subclassed model or layer.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, but it is {model!r}")
    if to not in CLASSES:
        raise ValueError(f"to must be one of {', '.join(map(repr, CLASSES))}, but it is {to!r}")
    if verbose not in (0, 1, 2):
        raise ValueError(f"verbose must be 0, 1 or 2, but it is {verbose!r}")
    copy, reports = Copier(model, CLASSES[to], fold).run()
    _compile(model, copy)
    if verbose:
        print(describe(model.name, to, reports, verbose > 1))
    return copy


def _compile(model: keras.Model, copy: keras.Model) -> None:
    """Compiles the copy as the model is, with the optimizer's state."""
    if not model.compiled:
        return
    try:
        copy.compile_from_config(model.get_compile_config())
    except (TypeError, ValueError, NotImplementedError) as error:
        warnings.warn(f"the copy of {model.name} must be compiled by hand: {error}", stacklevel=3)
        return
    if getattr(model, "optimizer", None) is None or not model.optimizer.built or not copy.compiled:
        return
    # An optimizer's variables are named after the weights that they belong to.
    state = {variable.path: variable for variable in model.optimizer.variables}
    paths = [variable.path for variable in copy.optimizer.variables]
    if len(state) != len(model.optimizer.variables) or sorted(state) != sorted(paths):
        warnings.warn(f"the optimizer of {model.name}'s copy has no state: weights share paths", stacklevel=3)
        return
    for variable in copy.optimizer.variables:
        variable.assign(state[variable.path])
