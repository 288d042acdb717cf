"""`tfops.keras.convert`: a model's batch norms replaced by tfops', or back."""

from __future__ import annotations

import warnings
from collections import Counter

import keras

from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._copying import Copier, Report

CLASSES = {"tfops": BatchNormalization, "keras": keras.layers.BatchNormalization}


def convert(model: keras.Model, to: str = "tfops", *, fold: bool = True, verbose: int = 1) -> keras.Model:
    """A copy of the model with tfops' batch norms in place of Keras', and what follows them folded in; or back.

    Every `keras.layers.BatchNormalization`, but no class derived from it, becomes a `tfops.keras.BatchNormalization`,
    in functional and Sequential models, in models and layers inside them, and in subclassed models and layers. In
    functional and Sequential models a batch norm also takes in

    - the addition that follows (`keras.layers.Add` of two tensors, or `x + y`), if the tensors are of one shape and
      dtype: batch norm's is then the only one of its inputs that is known to have no other reader. Dimensions that are
      not known are taken to be the same.
    - then, or at once, the activation that follows: relu, relu6, leaky_relu with a slope of 0.2, or silu, as a layer or
      an operation of Keras,

    where nothing else reads what comes before, and it is not an output of the model. A layer that is called several
    times takes in the same at every call, or nothing. In a model of several outputs, the layers that make them stay,
    because losses and metrics go by their names.

    The given model is left as it is. The copy has layers of the same names, without those that were folded in;
    variables of the same names, paths, values and `trainable`; and if the model is compiled, the copy is too, with the
    optimizer's state. Variables may be in another order than in the model (`model.weights`, and so files of
    weights) where an addition is folded in, not otherwise.

    Subclassed models and layers are copied by `from_config(get_config())`, in which their classes construct tfops'
    layers where they ask for Keras'. Such a model loaded from a file has Keras' batch norms again: convert it again.

    Args:
      model: of any kind.
      to: "tfops", or "keras" for the way back: every `tfops.keras.BatchNormalization` becomes Keras' own, followed by
        an `Add` and an `Activation` for what was fused in it, named after it.
      fold: whether batch norms take in anything. Without, variables are always in the same order.
      verbose: 0 prints nothing, 1 a line that says how many batch norms were replaced and what was folded in, 2 also
        a line for each, which says what was folded in or why not.

    Raises:
      TypeError: model is not a Keras model.
      ValueError: to or verbose is none of the above; or a layer or the model cannot be copied by its config; or the
        copy does not have the same variables, because the config does not tell all of the model; or (to="keras") a
        layer with a fused activation is inside a subclassed model or layer.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, but it is {model!r}")
    if to not in CLASSES:
        raise ValueError(f"to must be one of {', '.join(map(repr, CLASSES))}, but it is {to!r}")
    if verbose not in (0, 1, 2):
        raise ValueError(f"verbose must be 0, 1 or 2, but it is {verbose!r}")
    copier = Copier(model, CLASSES[to], fold)
    copy, reports = copier.run()
    _compile(model, copy, copier.paths)
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


def _compile(model: keras.Model, copy: keras.Model, paths: dict[str, str]) -> None:
    """Compiles the copy as the model is, with the optimizer's state; `paths` are of variables, from model to copy."""
    if not model.compiled:
        return
    try:
        copy.compile_from_config(model.get_compile_config())
    except (TypeError, ValueError, NotImplementedError) as error:
        warnings.warn(f"the copy of {model.name} must be compiled by hand: {error}", stacklevel=3)
        return
    if getattr(model, "optimizer", None) is None or not model.optimizer.built or not copy.compiled:
        return
    # An optimizer's variables are named after the variables that they belong to.
    names = {old.replace("/", "_"): new.replace("/", "_") for old, new in paths.items()}

    def renamed(path: str) -> str:
        scope, _, name = path.rpartition("/")
        owner = max((old for old in names if name.startswith(old)), key=len, default="")
        return f"{scope}/{names.get(owner, '')}{name.removeprefix(owner)}"

    state = {renamed(variable.path): variable for variable in model.optimizer.variables}
    mine = {variable.path: variable for variable in copy.optimizer.variables}
    if state.keys() != mine.keys() or not len(state) == len(mine) == len(model.optimizer.variables):
        warnings.warn(
            f"the optimizer of {model.name}'s copy starts without a state: names are not unique", stacklevel=3
        )
        return
    for path, variable in mine.items():
        variable.assign(state[path])
