"""Checks that a copy is one: the same variables, the same order of calls, and the same outputs on a probe."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfops.keras._folding import called, nodes
from tfops.keras._remaking import reason

# How far outputs may be apart, relative to their norm. This tells copies from other models, not rounding from none.
_TOLERANCE = {"float64": 1e-4, "float32": 1e-2}
_TOLERANCE_16 = 0.2
_SIZES = (32, 96)  # tried where a dimension is not known


def same_calls(model: keras.Model, calls: dict[int, Any], copy: keras.Model) -> str | None:
    """The name of a layer whose calls come in another order in the copy of a graph; None if there is none.

    Args:
      calls: by the id of each call in the model, that in the copy.
    """
    place = {id(node): index for index, node in enumerate(nodes(copy))}
    places = defaultdict(list)
    for node in nodes(model):
        if id(calls[id(node)]) not in place:
            continue  # an operation that computes a mask, which Keras before 3.10 has in its graphs, and nothing reads
        for layer in called(node):
            places[layer.name, id(layer)].append(place[id(calls[id(node)])])
    return next((name for (name, _), each in places.items() if each != sorted(each)), None)


def same_variables(wanted: list[Any], variables: dict[int, Any], got: list[Any]) -> str | None:
    """What is wrong with the copy's variables; None if nothing is."""
    if len(got) != len(wanted):
        return f"its copy has {len(got)} variables, not {len(wanted)}"
    for variable in wanted:
        new = variables.get(id(variable))
        if new is None:
            return f"its copy has no {variable.path}"
        if new.shape != variable.shape:
            return f"{variable.path} has shape {tuple(new.shape)} in its copy, not {tuple(variable.shape)}"
        if not np.array_equal(_bits(new), _bits(variable)):
            return f"{variable.path} has other values in its copy"
    return None


def same_order(model: keras.Model, variables: dict[int, Any], copy: keras.Model) -> bool:
    """Whether files and lists of the model's weights fit the copy."""
    return [id(variables[id(each)]) for each in model.weights] == [id(each) for each in copy.weights]


def _bits(variable: Any) -> npt.NDArray[np.uint8]:
    """The values, such that those that are not numbers are equal too."""
    values: npt.NDArray[Any] = keras.ops.convert_to_numpy(variable)
    return np.atleast_1d(values).view(np.uint8)


def same_outputs(model: keras.Model, copy: keras.Model) -> str | None:
    """How the copy's outputs differ in inference on random inputs; None if they do not, or if that cannot be told."""
    if not tf.executing_eagerly():
        return None
    problem = None
    # What chooses by comparing may choose otherwise for a rounding error, but hardly each time.
    for seed in range(3):
        inputs, wanted = _first_run(model, seed)
        if wanted is None:
            return None
        if (problem := _compare(model, copy, inputs, wanted)) is None:
            return None
    return problem


def _first_run(model: keras.Model, seed: int) -> tuple[Any, list[Any] | None]:
    """Random inputs that the model takes, and its outputs; None if there are none."""
    for size in _SIZES:
        inputs = _probe(model, size, seed)
        if inputs is not None and not isinstance(outputs := _run(model, inputs), Exception):
            return inputs, outputs
    return None, None


def _compare(model: keras.Model, copy: keras.Model, inputs: Any, wanted: list[Any]) -> str | None:
    got = _run(copy, inputs)
    if isinstance(got, Exception):
        return f"its copy cannot be called: {reason(got)}"
    if len(got) != len(wanted):
        return f"its copy has {len(got)} outputs, not {len(wanted)}"
    difference = max(map(_difference, got, wanted), default=0)
    if not difference:
        return None
    # Random numbers without a seed of their own are not the same twice.
    again = _run(model, inputs)
    if isinstance(again, Exception) or any(map(_difference, again, wanted)):
        return None
    return f"on random inputs its copy's outputs are others, by {difference:.0%} of their norm"


def _difference(got: Any, wanted: Any) -> float:
    """Relative to the norm; 0 if within the tolerance, or if it tells nothing."""
    if not hasattr(wanted, "dtype") or not hasattr(got, "shape"):
        return 0.0
    if got.shape != wanted.shape:
        return np.inf
    if not wanted.dtype.is_floating:
        return 0.0  # what is rounded may turn over
    tolerance = _TOLERANCE.get(wanted.dtype.name, _TOLERANCE_16)
    got, wanted = (tf.cast(each, tf.float64).numpy() for each in (got, wanted))
    if not np.isfinite(wanted).all():
        return 0.0
    difference = float(np.linalg.norm(got - wanted)) / max(float(np.linalg.norm(wanted)), 1e-30)
    return 0.0 if difference <= tolerance else difference


def _run(model: keras.Model, inputs: Any) -> list[Any] | Exception:
    """The outputs, or the error; the model's state stays what it was."""
    state = [(variable, variable.numpy()) for variable in model.non_trainable_variables]
    try:
        return list(keras.tree.flatten(model(inputs, training=False)))
    except Exception as error:
        return error
    finally:
        for variable, value in state:
            variable.assign(value)


def _probe(model: keras.Model, size: int, seed: int) -> Any:
    """Random inputs, of one element in a batch and `size` where a dimension is not known; None for unknown inputs."""
    rng = np.random.default_rng(seed)
    specs = _specs(model)
    if specs is None or any(spec.shape is None or "string" in spec.dtype for spec in keras.tree.flatten(specs)):
        return None

    def value(spec: keras.KerasTensor) -> tf.Tensor:
        batch, *dims = spec.shape or (1,)
        shape = (batch or 1, *(size if dim is None else dim for dim in dims)) if spec.shape else ()
        # Whole numbers may be indices.
        values = rng.random(shape) if "float" in spec.dtype else rng.integers(0, 2, shape)
        return tf.cast(values, spec.dtype)

    return keras.tree.map_structure(value, specs)


def _specs(model: keras.Model) -> Any:
    try:
        return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    except (AttributeError, ValueError):
        shapes = list((getattr(model, "_build_shapes_dict", None) or {}).values())
        if len(shapes) != 1 or not isinstance(shapes[0], tuple) or not all(_is_size(each) for each in shapes[0]):
            return None
        return keras.KerasTensor(shapes[0], dtype=model.input_dtype)


def _is_size(value: Any) -> bool:
    return value is None or isinstance(value, int)
