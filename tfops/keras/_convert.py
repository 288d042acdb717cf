"""`tfops.keras.convert`: a model's batch norms replaced by tfops', or back."""

from __future__ import annotations

from collections import Counter

import keras

from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._compiling import compile_like
from tfops.keras._copying import Copier, Report

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
    weights the same names, paths, values and `trainable`. Where additions are folded in, `copy.weights` may be in
    another order.

    If the model is compiled, so is the copy: with the same losses, with metrics of its own, and with an optimizer of
    its own in the same state, however deep that is wrapped. Optimizers and metrics are copied by their configs. A
    `compile` of the class' own is called with what the model is compiled with, or its `compile_from_config`, if it has
    one. Where that cannot be, a warning says what is to be done by hand.

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
    copier = Copier(model, CLASSES[to], fold)
    copy, reports = copier.run()
    compile_like(model, copy, copier.variables)
    if verbose:
        print(_describe(model.name, to, reports, verbose > 1))
    return copy


def _describe(name: str, to: str, reports: list[Report], each: bool) -> str:
    """What was done, in a line; and a line for each batch norm."""
    verb, other = ("folded in", "nothing") if to == "tfops" else ("unfolded", "nothing fused")
    kinds = Counter(" and ".join(report.kinds) or other for report in reports)
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    lines = [f"{name}: {len(reports)} batch norms replaced" + (f"; {verb}: {counts}" if reports else "")]
    if each and reports:
        width = max(len(report.name) for report in reports)
        lines += [f"  {report.name:<{width}}  {report.text}" for report in reports]
    return "\n".join(lines)
