"""`check`: the derivatives of any function against difference quotients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import keras
import numpy as np
import tensorflow as tf

from tfops.gradcheck._comparing import RTOL, Settings, draw_weights, gradients, is_near, tangents, values
from tfops.gradcheck._keras import in_float64
from tfops.gradcheck._op import Case, check_op
from tfops.gradcheck._problem import EPS, Problem, flatten
from tfops.gradcheck._report import Report, Row


@functools.singledispatch
def check(
    function: Callable[..., Any],
    inputs: Any,
    *,
    variables: Iterable[Any] | None = None,
    order: int = 2,
    forward: bool | None = None,
    float64: bool = True,
    eps: float | None = None,
    rtol: float | Mapping[str, float] | None = None,
    atol: float | None = None,
    samples: int = 16,
    kinks: float = 0.25,
    seed: int = 0,
) -> Report:
    """Compares the derivatives of a function, as TensorFlow has them, with difference quotients.

    The outputs are multiplied with random weights and summed. Of that sum, the derivative by each element of each input
    is taken twice: by `tf.GradientTape`, and as (f(x + h) - f(x - h)) / 2h. The gradient's own gradient is checked
    likewise, with respect to the weights too, and the outputs' derivatives by `tf.autodiff.ForwardAccumulator`.

    Inputs of narrower types are cast to float64 for the quotients. The function's derivatives in float64 are compared
    with the quotients, and those in its own types with those in float64, every element. A function that does not
    compute in float64, or has other values there, is compared with quotients in its own type, which are coarse. A Keras
    layer that has other values there, as random ones, is checked in float64 alone.

    A derivative may be off by rtol times the largest derivative by that input, plus atol times the largest one by any
    input, plus the rounding error of the quotient.

    Args:
        function: What to check: anything that maps tensors to tensors, with `tf.function` or without; or a Keras layer
            or model, which is called with `training=True` and `training=False` if these differ. It has to be
            deterministic. Or a `Case`, for which this is `check_op`.
        inputs: The function's argument, or a tuple of its arguments; a model's is one argument always. Any nested
            structure. Floating and complex tensors and arrays in it are differentiated, all else is passed along.
        variables: TensorFlow's or Keras' variables that the function uses. Trainable ones of floating types are
            differentiated; all have their values again after each call. A layer's own are known, and must not be given.
        order: The highest derivative to check: 1 for the gradient alone, 2 for the gradient's gradient too.
        forward: Whether to check forward mode. With None, a function that has none passes, and a row says so.
        float64: Whether to use float64 where the function can.
        eps: The step h where |x| is about 1 or less, else it is relative to x. A power of two is best. None means 2^-17
            in float64, 2^-8 in float32, 2^-4 in float16 and 2^-3 in bfloat16.
        rtol: For all types, or by their names. None means 1e-6 for float64, 1e-3 for float32, 0.02 for float16 and 0.1
            for bfloat16.
        atol: None means a tenth of rtol.
        samples: An input of more elements than this is checked in so many of them, drawn at random, and along two
            random directions in which all elements change.
        kinks: The share of an input's elements that may be left out because the function has a kink there.
        seed: Of all that is random.

    Returns:
        A row for each comparison; true if all are right.

    Raises:
        TypeError: `function` is not callable, or returns no floating tensor.
        ValueError: Another argument is wrong, or there is nothing to differentiate with respect to.

    Examples:
        >>> import tensorflow as tf
        >>> from tfops import gradcheck
        >>> @tf.custom_gradient
        ... def cube(x):
        ...     return x**3, lambda dy: dy * 2 * x**2
        >>> report = gradcheck.check(cube, tf.constant([1.0, 2.0]), order=1)
        >>> report.ok
        False
        >>> {row.kind for row in report.rows if not row.ok}
        {'gradient'}
        >>> gradcheck.check(tf.linalg.matmul, (tf.ones([2, 3]), tf.ones([3, 4]))).ok
        True
    """
    _check_arguments(function, order, eps, rtol, atol, samples, kinks)
    given = rtol if isinstance(rtol, Mapping) else {} if rtol is None else dict.fromkeys(RTOL, rtol)
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for mode, problems in _modes(function, inputs, variables, float64):
        settings = Settings(eps, {**RTOL, **given}, atol, samples, kinks, rng, mode)
        wrong = [row for problem in problems for row in values(problem, settings)]
        rows += wrong
        groups = [] if wrong else _groups(problems, settings)
        if len(groups) > 1 and isinstance(function, keras.Layer):
            note = "has other values than in float64, as of random numbers: not checked in this type"
            rows.append(Row("output", "", mode, groups.pop()[0].dtype, note=note))
        for group in groups:
            rows += _derivatives(group, order, forward, settings)
    name = getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__
    return Report(str(name), tuple(rows))


check.register(Case, cast(Any, check_op))  # whose results are of another type, which functools' types cannot say


def _check_arguments(
    function: Any, order: int, eps: float | None, rtol: Any, atol: float | None, samples: int, kinks: float
) -> None:
    if not callable(function):
        raise TypeError(f"function must be callable, but it is {function!r}")
    if isinstance(rtol, Mapping) and not set(rtol) <= set(RTOL):
        raise ValueError(f"rtol must be a number or have keys among {', '.join(RTOL)}, but it is {rtol!r}")
    tolerances = [*(rtol.values() if isinstance(rtol, Mapping) else [rtol]), atol]
    if not all(each is None or each >= 0 for each in tolerances):
        raise ValueError(f"rtol and atol must be at least 0, but they are {rtol!r} and {atol!r}")
    if eps is not None and not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, but it is {eps!r}")
    if not 0 <= kinks <= 1:
        raise ValueError(f"kinks must be in [0, 1], but it is {kinks!r}")
    for name, value, least in (("order", order, 1), ("samples", samples, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, but it is {value!r}")


class _Source(NamedTuple):
    """A function and the variables that it uses, under the names that they have in the report."""

    function: Callable[..., Any]
    variables: dict[str, Any]

    def problem(self, inputs: Any, unpack: bool, dtype: str | None = None) -> Problem:
        """The function of its inputs and of its trainable variables."""
        trainable = {
            name: each
            for name, each in self.variables.items()
            if each.trainable and tf.as_dtype(each.dtype).name in EPS and tf.TensorShape(each.shape).num_elements()
        }
        return flatten(self.function, inputs, trainable, list(self.variables.values()), unpack, dtype)


def _modes(
    function: Callable[..., Any], inputs: Any, variables: Iterable[Any] | None, float64: bool
) -> Iterator[tuple[str, list[Problem]]]:
    """The problems of a function; of a layer, those of each mode."""
    if not isinstance(function, keras.Layer):
        source = _Source(function, _named(variables or ()))
        yield "", _problems(source, source if float64 else None, inputs, unpack=True)
        return
    if variables is not None:
        raise ValueError(f"variables must be None where function is a Keras layer, but they are {variables!r}")
    unpack = not isinstance(function, keras.Model)
    if not function.built:
        function(*inputs if unpack and type(inputs) is tuple else [inputs])
    copy = in_float64(function) if float64 else None
    names = _named(function.variables)  # a copy's may have other paths
    found = {}
    for mode in ("training", "inference"):
        own, *wide = (
            _Source(functools.partial(each, training=mode == "training"), dict(zip(names, each.variables, strict=True)))
            for each in (function, copy)
            if each is not None
        )
        found[mode] = _problems(own, wide[0] if wide else None, inputs, unpack)
    outputs = [each[-1].outputs.values() for each in found.values()]
    if len(outputs[0]) == len(outputs[1]) and all(map(np.array_equal, *outputs)):
        found = {"": found["inference"]}
    yield from found.items()


def _named(variables: Iterable[Any]) -> dict[str, Any]:
    variables = list(variables)
    names = [getattr(each, "path", each.name).removesuffix(":0") for each in variables]
    return {
        name if names.count(name) == 1 else f"variables[{index}]": each
        for index, (name, each) in enumerate(zip(names, variables, strict=True))
    }


def _problems(own: _Source, wide: _Source | None, inputs: Any, unpack: bool) -> list[Problem]:
    """The function in float64, if it has that, and as it is."""
    problem = own.problem(inputs, unpack)
    if not problem.names:
        raise ValueError(
            f"inputs must hold a tensor or array of dtype {', '.join(EPS)}, or variables a trainable one, but inputs "
            f"is {inputs!r}"
        )
    if not problem.outputs:
        raise TypeError(f"function must return a tensor of dtype {', '.join(EPS)}, but {own.function!r} returns none")
    if wide is None or problem.dtype == "float64":
        return [problem]
    try:
        widened = wide.problem(inputs, unpack, "float64")
    except Exception:
        return [problem]
    return [widened, problem] if widened.dtype == "float64" else [problem]


def _groups(problems: list[Problem], settings: Settings) -> list[list[Problem]]:
    """Problems that have the same values at the point, and so may be compared."""
    if len(problems) == 1:
        return [problems]
    widened, own = problems
    tolerance = settings.rtol[own.dtype]
    near = len(widened.outputs) == len(own.outputs) and all(
        is_near(y, other, tolerance) for y, other in zip(widened.outputs.values(), own.outputs.values(), strict=True)
    )
    return [problems] if near else [[widened], [own]]


def _derivatives(problems: list[Problem], order: int, forward: bool | None, settings: Settings) -> list[Row]:
    rows: list[Row] = []
    for level in range(order):
        weights = draw_weights(problems, settings.rng)
        found = gradients("gradient" + " of gradient" * level, problems, weights, settings)
        rows += found
        if level == 0 and forward is not False:
            rows += tangents(problems, settings, required=bool(forward))
        if level + 1 == order or not all(math.isfinite(row.error) for row in found):
            break  # what is not finite, or not there, has no derivative
        problems = [problem.gradient(weights) for problem in problems]
    return rows
