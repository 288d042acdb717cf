"""What is checked: a function from a list of real tensors to named real tensors, at a point, in certain dtypes.

A function of nested structures, integers, complex tensors and variables is made one of these, and so is the gradient of
a problem: second derivatives are the first ones of another problem.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
Call = Callable[[Sequence[Any]], dict[str, tf.Tensor]]


class Problem:
    """A function of leaves, at a point. All numbers outside TensorFlow are float64.

    Attributes:
        call: Takes the leaves, tensors and variables, and returns its outputs by their names.
        names: Of the leaves.
        values: Of the leaves: the point.
        dtypes: Of the leaves.
        outputs: What `call` returns at the point.
        output_dtypes: Their dtypes.
    """

    def __init__(
        self,
        call: Call,
        names: Sequence[str],
        values: Sequence[npt.NDArray[Any]],
        dtypes: Sequence[str],
        variables: Sequence[tf.Variable | None] | None = None,
        state: Sequence[tf.Variable] = (),
    ):
        """Runs the function once.

        Args:
            variables: For each leaf the variable that `call` reads in its place, or None for a tensor.
            state: All variables that `call` may change: each run finds them as they are now, and leaves them so.
        """
        self.call = call
        self.names, self.values, self.dtypes = list(names), list(values), list(dtypes)
        self._variables = list(variables or [None] * len(self.names))
        self._state = list(state)
        with self._leaves(self.values) as leaves:
            outputs = call(leaves)
        self.outputs = {name: _float64(y) for name, y in outputs.items()}
        self.output_dtypes: list[str] = [y.dtype.name for y in outputs.values()]

    @property
    def dtype(self) -> str:
        """The least precise of all dtypes."""
        return max([*self.dtypes, *self.output_dtypes], key=lambda dtype: EPS[dtype])

    @contextlib.contextmanager
    def _leaves(self, values: Sequence[npt.NDArray[Any]]) -> Iterator[list[Any]]:
        """The leaves with these values. Variables have their old ones again afterwards, whatever happens."""
        before = [tf.identity(variable) for variable in self._state]
        try:
            leaves = []
            for value, dtype, variable in zip(values, self.dtypes, self._variables, strict=True):
                leaves.append(tf.constant(value, dtype))
                if variable is not None:
                    variable.assign(leaves[-1])
                    leaves[-1] = variable
            yield leaves
        finally:
            for variable, value in zip(self._state, before, strict=True):
                variable.assign(value)

    def run(self, index: int | None = None, value: npt.NDArray[Any] | None = None) -> list[npt.NDArray[Any]]:
        """The outputs at the point, or where the leaf `index` has another value."""
        values = [value if i == index and value is not None else own for i, own in enumerate(self.values)]
        with self._leaves(values) as leaves:
            return [_float64(y) for y in self.call(leaves).values()]

    def gradients(self, weights: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any] | None]:
        """The derivative of sum(weights * outputs) by each leaf; None where TensorFlow has None."""
        with self._leaves(self.values) as leaves:
            found = _gradients(self.call, leaves, _constants(weights, self.output_dtypes))
            return [None if each is None else _float64(each) for each in found]

    def tangents(self, index: int, direction: npt.NDArray[Any]) -> list[npt.NDArray[Any] | None]:
        """The derivative of each output along a direction of the leaf `index`, by forward mode."""
        with self._leaves(self.values) as leaves:
            tangent = tf.constant(direction, self.dtypes[index])
            with tf.autodiff.ForwardAccumulator(leaves[index], tangent) as accumulator:
                outputs = list(self.call(leaves).values())
            found = [accumulator.jvp(y) for y in outputs]
            return [None if each is None else _float64(each) for each in found]

    def gradient(self, weights: Sequence[npt.NDArray[Any]]) -> Problem:
        """The problem whose outputs are the gradients of this one, and whose leaves are this one's and the weights."""
        count = len(self.names)

        def call(leaves: Sequence[Any]) -> dict[str, tf.Tensor]:
            found = _gradients(self.call, leaves[:count], leaves[count:])
            return {
                f"gradient of {name}": tf.zeros_like(leaf) if each is None else tf.convert_to_tensor(each)
                for name, leaf, each in zip(self.names, leaves[:count], found, strict=True)
            }

        return Problem(
            call,
            [*self.names, *(f"output gradient of {name}" for name in self.outputs)],
            [*self.values, *weights],
            [*self.dtypes, *self.output_dtypes],
            [*self._variables, *[None] * len(weights)],
            self._state,
        )


def rounded(value: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """The value as a tensor of this type holds it."""
    return value if dtype == "float64" else _float64(tf.constant(value, dtype))


def _float64(x: Any) -> npt.NDArray[Any]:
    return np.asarray(tf.cast(tf.convert_to_tensor(x), tf.float64))


def _constants(values: Sequence[npt.NDArray[Any]], dtypes: Sequence[str]) -> list[tf.Tensor]:
    return [tf.constant(value, dtype) for value, dtype in zip(values, dtypes, strict=True)]


def _gradients(call: Call, leaves: Sequence[Any], upstream: Sequence[tf.Tensor]) -> list[Any]:
    with tf.GradientTape() as tape:
        tape.watch(list(leaves))
        outputs = list(call(leaves).values())
    return list(tape.gradient(outputs, list(leaves), output_gradients=list(upstream)))


def flatten(
    function: Callable[..., Any],
    inputs: Any,
    variables: Mapping[str, Any],
    state: Sequence[Any],
    unpack: bool,
    dtype: str | None = None,
) -> Problem:
    """A function of a nested structure, and of variables, as a problem.

    Args:
        function: Returns any structure. What is not a floating or complex tensor in it is left out.
        inputs: Its argument, or a tuple of its arguments. What is not a floating or complex tensor or array in it is
            passed along.
        variables: Those to differentiate with respect to, by their names.
        state: All variables that the function may change.
        unpack: Whether a tuple holds several arguments.
        dtype: That of the leaves. None means their own.
    """
    structure = tf.nest.map_structure(_read, inputs)
    flat = tf.nest.flatten(structure, expand_composites=True)
    names: list[str] = []
    values: list[npt.NDArray[Any]] = []
    dtypes: list[str] = []
    parts: dict[int, list[int]] = {}  # which leaves an element of `flat` is made of
    for place, (name, value) in enumerate(zip(_paths(structure, "inputs"), flat, strict=True)):
        for part, tensor in _real_parts(value).items():
            if np.size(tensor):
                parts.setdefault(place, []).append(len(names))
                names.append(name + part)
                values.append(_float64(tensor))
                dtypes.append(dtype or tensor.dtype.name)
    read = [None] * len(names) + [_of_tensorflow(each) for each in variables.values()]
    names += variables
    values += [_float64(each) for each in read if each is not None]
    dtypes += [each.dtype.name for each in read if each is not None]

    def call(leaves: Sequence[Any]) -> dict[str, tf.Tensor]:
        filled = list(flat)
        for place, indices in parts.items():
            tensors = [leaves[index] for index in indices]
            filled[place] = tf.complex(*tensors) if len(tensors) == 2 else tensors[0]
        arguments = tf.nest.pack_sequence_as(structure, filled, expand_composites=True)
        result = function(*arguments) if unpack and type(arguments) is tuple else function(arguments)
        result = tf.nest.map_structure(_read, result)
        outputs = zip(_paths(result, "outputs"), tf.nest.flatten(result, expand_composites=True), strict=True)
        return {name + part: y for name, value in outputs for part, y in _real_parts(value).items()}

    return Problem(call, names, values, dtypes, read, [_of_tensorflow(each) for each in state])


def _of_tensorflow(variable: Any) -> tf.Variable:
    """TensorFlow's variable behind Keras' own."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def _read(value: Any) -> Any:
    return tf.convert_to_tensor(value) if isinstance(value, tf.Variable) else value


def _real_parts(value: Any) -> dict[str, tf.Tensor]:
    """The value as tensors of real numbers, by what is added to its name; none if it is nothing to differentiate."""
    if not isinstance(value, (tf.Tensor, np.ndarray, np.generic)):
        return {}
    dtype = tf.as_dtype(value.dtype)
    if dtype.is_complex:
        return {".real": tf.math.real(value), ".imag": tf.math.imag(value)}
    return {"": tf.convert_to_tensor(value)} if dtype.name in EPS else {}


def _paths(structure: Any, name: str) -> Iterator[str]:
    """Names such as inputs[0]['x'] of what tf.nest.flatten finds, in its order."""
    if isinstance(structure, Mapping):
        for key in sorted(structure):
            yield from _paths(structure[key], f"{name}[{key!r}]")
    elif isinstance(structure, tuple) and hasattr(structure, "_fields"):
        for field in structure._fields:
            yield from _paths(getattr(structure, field), f"{name}.{field}")
    elif isinstance(structure, (list, tuple)):
        for index, each in enumerate(structure):
            yield from _paths(each, f"{name}[{index}]")
    else:
        parts = tf.nest.flatten(structure, expand_composites=True)
        alone = len(parts) == 1 and parts[0] is structure
        yield from [name] if alone else (f"{name}.parts[{index}]" for index in range(len(parts)))
