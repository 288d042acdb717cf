"""Compiles the copy of a model as the model is compiled: losses, metrics, and the optimizer with its state."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from tfops.keras._attributes import carry_plain

# Where Keras keeps metrics of its own, and notes all of a layer's.
_KERAS_METRICS = ("_compile_loss", "_compile_metrics", "_loss_tracker", "_metrics")


def compile_like(model: keras.Model, copy: keras.Model, variables: Mapping[int, Any]) -> None:
    """Compiles `copy` as `model` is, under its strategy; where that cannot be, a warning says what is left to do.

    Losses are the model's own. Metrics and the optimizer have state: the copy gets others, and the optimizer's state.

    Args:
      model: if it is not compiled, the copy will not be either, whatever its class does when it is constructed.
      copy: has outputs of the same names.
      variables: by the id of each variable of the model, that of the copy.
    """
    if copy.compiled:  # by its class' constructor
        uncompile(copy)
    if not model.compiled:
        return
    try:
        with model.distribute_strategy.scope():
            _compile(model, copy)
    except Exception as error:
        uncompile(copy)
        _warn(
            f"the copy of {model.name} is not compiled: {_reason(error)}. Compile it by hand, by copy.compile(...) "
            f"with what {model.name} was compiled with"
        )
        return
    for what, problem in transfer_states(model, copy, model, variables):
        name = what.partition("[")[0]
        what = "optimizer" if isinstance(getattr(model, name), keras.optimizers.Optimizer) else what
        _warn(
            f"the copy of {model.name} is compiled, but its {what} begins anew: {problem}. Give "
            f"the variables of copy.{name} the values of {model.name}'s by hand, or convert before training"
        )


def transfer_states(
    layer: keras.Layer, copy: keras.Layer, model: keras.Model, variables: Mapping[int, Any]
) -> list[tuple[str, str]]:
    """Gives the optimizers and metrics that are attributes of a copy the state of those of the layer.

    Args:
      model: what is converted, which the layer is or is in.
      variables: by the id of each variable of the model, that of the copy.

    Returns:
      what begins anew, for instance "optimizers[1]", and why.
    """
    variables = {**variables, **{id(v.value): variables[id(v)].value for v in model.variables if id(v) in variables}}
    copied = dict(_held(copy))
    problems = []
    for place, value in _held(layer):
        new = copied.get(place)
        try:
            if type(new) is not type(value):
                raise ValueError(f"what its copy has there is no {type(value).__name__}")
            with model.distribute_strategy.scope():
                _transfer(value, new, model, variables)
        except Exception as error:
            problems.append((place[0] + "".join(f"[{part!r}]" for part in place[1:]), _reason(error)))
    return problems


def _held(layer: keras.Layer) -> Iterator[tuple[Place, Any]]:
    """The optimizers and metrics that are attributes of a layer, or in lists and dictionaries that are, with places."""

    def inside(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
        if is_stateful(value):
            yield place, value
        elif isinstance(value, (dict, list, tuple)):
            for name, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield from inside(part, (*place, name))

    for name, value in list(vars(layer).items()):
        if name not in _KERAS_METRICS and not name.startswith(("_self_", "_tracker")):
            yield from inside(value, (name,))


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)  # where `convert` is called


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def uncompile(model: keras.Model) -> None:
    """Undoes `compile`, for which Keras has no way."""
    model.compiled = False
    model.optimizer = model.loss = None
    model._compile_loss = model._compile_metrics = model._loss_tracker = None
    if hasattr(model, "_compile_config"):
        del model._compile_config


def _compile(model: keras.Model, copy: keras.Model) -> None:
    cls = type(model)
    if cls.compile_from_config is not keras.Model.compile_from_config:
        copy.compile_from_config(model.get_compile_config())  # the class says how
        if not copy.compiled:
            raise ValueError(f"{cls.__name__}.compile_from_config() does not compile it")
        return
    stock, own = (inspect.signature(each.compile).parameters for each in (keras.Model, cls))
    any_kind = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    # What the class' own `compile` takes beside is known if the model keeps it under the same name.
    extra = [name for name, each in own.items() if name not in stock and each.kind not in any_kind]
    if lost := [name for name in extra if isinstance(getattr(model, name, model), keras.Layer)]:
        raise ValueError(f"{cls.__name__}.compile() takes what {model.name} does not keep ({', '.join(lost)})")
    given = {**_compiled_with(model), **{name: getattr(model, name) for name in extra}}
    made: dict[int, Any] = {}  # by the id of what it is like: what is shared stays so

    def like(value: Any) -> Any:
        if _has_state(value) and id(value) not in made:
            made[id(value)] = make_like(value)
        return made.get(id(value), value)

    arguments = {name: keras.tree.map_structure(like, value) for name, value in given.items() if name != "loss"}
    arguments["loss"] = given["loss"]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in own.values())
    copy.compile(**{name: value for name, value in arguments.items() if takes_any or name in own})
    for name in ("run_eagerly", "jit_compile", "steps_per_execution"):
        if not takes_any and name not in own:
            setattr(copy, name, given[name])
    got = {**_compiled_with(copy), **{name: getattr(copy, name, None) for name in extra}}
    changed = [name for name in given if name != "jit_compile" and not _is_same(got[name], arguments[name])]
    if changed:
        raise ValueError(f"{cls.__name__}.compile() makes something else of what it is given ({', '.join(changed)})")


def _compiled_with(model: keras.Model) -> dict[str, Any]:
    """The arguments of Keras' `compile` as they hold now, which need not be those of its last call."""
    losses, metrics = model._compile_loss, model._compile_metrics
    return {
        "optimizer": model.optimizer,
        "loss": model.loss,
        "loss_weights": losses and losses._user_loss_weights,
        "metrics": metrics and metrics._user_metrics,
        "weighted_metrics": metrics and metrics._user_weighted_metrics,
        "run_eagerly": model.run_eagerly,
        "jit_compile": model.jit_compile,
        "steps_per_execution": model.steps_per_execution,
        "auto_scale_loss": False,  # the optimizer does that, or does not
    }


def _is_same(got: Any, want: Any) -> bool:
    """Whether two structures hold the same, or equals, or optimizers and metrics of one class and config."""

    def equal(a: Any, b: Any) -> bool:
        if a is b or type(a) is not type(b):
            return a is b
        return {**a.get_config(), "name": b.name} == b.get_config() if _has_state(a) else bool(a == b)

    leaves = keras.tree.flatten(got), keras.tree.flatten(want)
    return len(leaves[0]) == len(leaves[1]) and all(map(equal, *leaves))


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers and metrics hold variables, functions and one another, in attributes, lists and dictionaries. The way from
# the outermost to one of these is its place.

Place = tuple[Any, ...]


def _places(value: Any, place: Place = (), seen: set[int] | None = None) -> Iterator[tuple[Place, Any]]:
    """An optimizer or metric and all that it holds, down to variables and layers, with the places."""
    yield place, value
    seen = set() if seen is None else seen
    parts: Iterable[tuple[Any, Any]]
    if id(value) in seen:
        return
    if isinstance(value, dict):
        parts = enumerate(value.values())  # keys may stand for a variable
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    elif hasattr(value, "__dict__") and not _is_leaf(value):
        # Without what TensorFlow and Keras note of it for themselves, which may be of the past.
        parts = [item for item in sorted(vars(value).items()) if not item[0].startswith(("_self_", "_tracker"))]
    else:
        return
    seen.add(id(value))
    for name, part in parts:
        yield from _places(part, (*place, name), seen)


def _is_leaf(value: Any) -> bool:
    """Whether it is none of the objects that optimizers and metrics are made of."""
    is_function_or_strategy = type(value).__module__.partition(".")[0] in ("builtins", "tensorflow")
    # A set has no order to go by. Keras' own know the tracker of what they are in.
    return is_function_or_strategy or _is_variable(value) or isinstance(value, (keras.Layer, set))


def _is_variable(value: Any) -> bool:
    return isinstance(value, (keras.Variable, tf.Variable))


def _has_state(value: Any) -> bool:
    return _is_variable(value) or is_stateful(value)


def is_stateful(value: Any) -> bool:
    """Whether it is an optimizer or a metric."""
    return isinstance(value, (keras.optimizers.Optimizer, keras.metrics.Metric))


def make_like(original: Any) -> Any:
    """A new optimizer or metric of the same class and config, which holds the same functions."""
    if isinstance(getattr(original, "_optimizer_map", None), types.FunctionType):
        raise ValueError(f"{original.name} chooses optimizers by a function, which might choose those of the model")
    held = dict(_places(original))
    functions = {place: value for place, value in held.items() if isinstance(value, types.FunctionType)}
    # Keras finds classes and functions by name, if they are registered or in a module. These are at hand.
    named: list[Any] = [*functions.values(), *(type(value) for value in held.values() if hasattr(value, "get_config"))]
    custom = {each.__name__: each for each in named if each.__module__.partition(".")[0] != "keras"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lambdas in configs
        try:
            config = keras.saving.serialize_keras_object(original)
            copy = keras.saving.deserialize_keras_object(config, custom_objects=custom, safe_mode=False)
        except Exception as error:
            raise ValueError(f"its {type(original).__name__} cannot be copied by from_config(get_config())") from error
    copied = dict(_places(copy))
    if {id(value) for value in held.values() if _has_state(value)} & {id(value) for value in copied.values()}:
        raise ValueError(f"{original.name} and what is made by its from_config(get_config()) share their state")
    for place, function in functions.items():
        # What became of a lambda has its code, but not what that refers to.
        if isinstance(copied.get(place), types.FunctionType) and isinstance(place[-1], str):
            setattr(copied[place[:-1]], place[-1], function)
    return copy


def _transfer(original: Any, copy: Any, model: keras.Model, variables: Mapping[int, Any]) -> None:
    """Builds the copy of an optimizer on what became of the same variables, and gives it, or a metric's, the state.

    What two optimizers of one config hold, built on lists of variables that correspond, has the same places in both.
    """
    if copy is original:
        raise ValueError(f"it has the same {original.name} as the model")
    _carry_settings(original, copy, model, variables)
    if isinstance(original, keras.optimizers.Optimizer) and original.built and not copy.built:
        built_on = original._trainable_variables or model.trainable_variables
        copy.build([_find(variable, variables) for variable in built_on])
    copied = dict(_places(copy))
    state: dict[int, tuple[Any, Any]] = {}
    for place, variable in _places(original):
        if not _is_variable(variable):
            continue
        new: Any = copied.get(place)
        known = variables.get(id(variable))
        if known is None and _is_variable(new) and new.shape == variable.shape and new.dtype == variable.dtype:
            known = state.setdefault(id(variable), (variable, new))[1]
        if known is None or (new is not None and new is not known):
            raise ValueError(f"its copy has nothing like its variable {_name(variable)}")
    for variable, new in state.values():
        new.assign(variable)


def _carry_settings(original: Any, copy: Any, model: keras.Model, variables: Mapping[int, Any]) -> None:
    """Gives the copy of an optimizer or metric, and those in it, what is set beside their configs."""
    copied = dict(_places(copy))
    for place, value in _places(original):
        new: Any = copied.get(place)
        if not is_stateful(value) or type(new) is not type(value):
            continue
        carry_plain(value, new)
        if hasattr(value, "_exclude_from_weight_decay"):
            # By keys of variables, which may be their ids.
            pairs = [(each, variables[id(each)]) for each in model.variables if id(each) in variables]
            keys = {value._var_key(each): new._var_key(other) for each, other in pairs}
            new._exclude_from_weight_decay = {keys[key] for key in value._exclude_from_weight_decay if key in keys}
            new._exclude_from_weight_decay_pattern = value._exclude_from_weight_decay_pattern
            new._exclude_from_weight_decay_cache = {}


def _find(variable: Any, variables: Mapping[int, Any]) -> Any:
    if id(variable) not in variables:
        raise ValueError(f"it was built on {_name(variable)}, which is not the model's")
    return variables[id(variable)]


def _name(variable: Any) -> str:
    return str(getattr(variable, "path", variable.name))
