"""`check_op`: numerical against analytic gradients of `tfops.fused_batch_norm`.

Every combination of dtype, layout, mode, activation and residual is one small problem. The loss is sum(y * w), plus, in
mode "moving", the sums of the mean and variance outputs times weights of their own. Its derivative with respect to
every element of every input is taken twice:

- The analytic one is the op's registered gradient, run in the dtype under test.
- The numerical one are central differences, (loss(v + h) - loss(v - h)) / 2h, of the op itself run in float64. That
  holds for the lower dtypes too: a difference quotient in float16 would be rounding noise. All inputs are multiples of
  1/32 below 8, which all four dtypes represent exactly. So the float64 problem is the same problem to the last bit, and
  one numerical gradient serves all four.

An activation's kink within reach of a perturbation or of rounding would make the comparison meaningless. Inputs are
drawn, channel by channel, until every argument of the activation keeps `KINK_MARGIN` away from 0 and 6, and all three
pieces of relu6 are hit.

The error of an input's gradient is max |analytic - numerical| / max |numerical|. It may be up to:

- 1e-6 in float64. With the step 2^-16 the truncation error is of order h^2 = 2e-10 and the cancellation of order
  eps / h = 1e-11, so a correct gradient passes with a large margin.
- eps(g) / 2 + 32 * eps(float32) in float32, float16 and bfloat16, where g is the dtype of the gradient itself: that of
  the data for x and residual, float32 for scale, offset, mean and variance. The op's arithmetic is in float32 for all
  three, so a gradient is rounded to g once, which costs up to eps(g) / 2 of its largest element (nothing for float32,
  where that rounding is part of the arithmetic). The arithmetic is a sum of up to 24 terms between some ten other
  operations, of up to eps(float32) / 2 each: 17 eps(float32), doubled for cancellation in the sums. An op that keeps
  intermediates in 16 bits does not pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfops import _activations, fused_batch_norm
from tfops._arguments import activation_argument
from tfops.gradcheck._differences import element, quotients
from tfops.gradcheck._problem import Problem

DTYPES = ("float64", "float32", "float16", "bfloat16")
SHAPES = {"NHWC": (3, 2, 4, 5), "NCHW": (4, 3, 2, 3), "NC": (12, 5)}
LAYOUTS = tuple(SHAPES)
MODES = ("training", "moving", "inference")
INPUTS = ("x", "scale", "offset", "residual", "mean", "variance")
Function = Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]]  # with the signature of fused_batch_norm

EPSILON = 1e-3
MOVING_FACTOR = 0.25  # exponential_avg_factor of mode "moving"
STEP = 2.0**-16  # a power of two: v + h and v - h are exact
KINKS = tuple(sorted({kink for each in _activations.ACTIVATIONS.values() for kink in each.kinks}))
KINK_MARGIN = 0.1  # a perturbation moves z by 1e-4 at most, rounding z to bfloat16 by 0.03


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination, in all dtypes.

    Attributes:
        layout: "NHWC", "NCHW" or "NC".
        mode: "training" (loss of y alone), "moving" (training with exponential_avg_factor < 1 and the mean and
            variance outputs in the loss) or "inference".
        activation: As for `tfops.fused_batch_norm`.
        residual: Whether a residual is added before the activation.

    Raises:
        ValueError: A field has another value.
    """

    layout: str = "NHWC"
    mode: str = "training"
    activation: str | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("layout", LAYOUTS), ("mode", MODES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        activation_argument(self.activation)

    @property
    def channel_axis(self) -> int:
        """The dimension of the channels."""
        return 1 if self.layout == "NCHW" else len(SHAPES[self.layout]) - 1

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The names of the inputs that the loss is differentiated with respect to."""
        statistics = ("mean", "variance") if self.mode != "training" else ()
        return ("x", "scale", "offset") + (("residual",) if self.residual else ()) + statistics


@dataclasses.dataclass(frozen=True)
class Result:
    """What `check_op` found for one case in one dtype.

    Attributes:
        case: The combination.
        dtype: The dtype of x.
        device: The device that y was computed on.
        errors: For each differentiated input, max |analytic - numerical| / max |numerical|; infinite where the op
            gave no gradient.
        tolerances: For each differentiated input, the largest error allowed.
    """

    case: Case
    dtype: str
    device: str
    errors: dict[str, float]
    tolerances: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest error in units of its tolerance; NaN if any error is."""
        return float(np.max([self.errors[name] / self.tolerances[name] for name in self.errors]))

    @property
    def passed(self) -> bool:
        """Whether every error is within its tolerance; False if any error is NaN."""
        return self.worst <= 1.0


def gradient_dtype(name: str, dtype: str) -> str:
    """The dtype of the input `name`, and so of its gradient, for data of `dtype`."""
    if name in ("x", "residual", "y"):
        return dtype
    return "float64" if dtype == "float64" else "float32"


def tolerance(name: str, dtype: str) -> float:
    """The largest relative error allowed in the gradient of the input `name`; see the top of this file."""
    if dtype == "float64":
        return 1e-6
    arithmetic = 32 * float(np.finfo(np.float32).eps)
    if gradient_dtype(name, dtype) == "float32":
        return arithmetic
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype] / 2 + arithmetic


def draw_inputs(case: Case, rng: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    """Draws the inputs of a problem, with every activation argument away from the kinks.

    Args:
        case: The combination.
        rng: Where the numbers come from.

    Returns:
        x and residual of shape `SHAPES[case.layout]`; scale, offset, mean and variance of shape `[channels]`; all
        float64 multiples of 1/32 of magnitude below 8.
    """

    def grid(values: npt.NDArray[Any] | float) -> npt.NDArray[Any]:
        return np.round(np.asarray(values) * 32) / 32

    shape = SHAPES[case.layout]
    channels = shape[case.channel_axis]
    count = math.prod(shape) // channels
    kinks = {*KINKS, *(_activations.find(case.activation).kinks if case.activation else ())}
    columns: list[tuple[Any, ...]] = []
    while len(columns) < channels:
        x = grid(rng.uniform(-0.5, 0.5) + rng.normal(size=count))
        scale = grid(rng.uniform(2, 4) * rng.choice([-1, 1]))
        offset = grid(rng.uniform(1, 4))
        residual = grid(rng.normal(size=count))
        mean = grid(rng.uniform(-0.5, 0.5))
        variance = grid(rng.uniform(0.5, 2))
        batch = (mean, variance) if case.mode == "inference" else (np.mean(x), np.var(x))
        z = (x - batch[0]) / np.sqrt(batch[1] + EPSILON) * scale + offset + residual * case.residual
        clear = all(np.all(np.abs(z - kink) > KINK_MARGIN) for kink in kinks)
        pieces = np.any(z < 0) and np.any((z > 0) & (z < 6)) and np.any(z > 6)
        if clear and pieces:
            columns.append((x, scale, offset, residual, mean, variance))

    x, scale, offset, residual, mean, variance = (np.stack(values, axis=-1) for values in zip(*columns, strict=True))
    others = [size for axis, size in enumerate(shape) if axis != case.channel_axis]
    x, residual = (np.moveaxis(data.reshape(*others, channels), -1, case.channel_axis) for data in (x, residual))
    return {"x": x, "scale": scale, "offset": offset, "residual": residual, "mean": mean, "variance": variance}


def draw_weights(case: Case, rng: np.random.Generator) -> list[npt.NDArray[Any]]:
    """Draws the loss' weights on y, and in mode "moving" on the mean and variance outputs.

    Returns:
        Float64 multiples of 1/32, of the shapes of the outputs. Those on the statistics are as many times larger as a
        channel has elements: each element of x moves a mean by 1 / count only, which would drown in dy's share.
    """
    shape = SHAPES[case.layout]
    channels = shape[case.channel_axis]
    count = math.prod(shape) // channels
    weights = [np.round(rng.normal(size=shape) * 32) / 32]
    if case.mode == "moving":
        weights += [np.round(rng.normal(size=channels) * 32) / 32 * count for _ in ("mean", "variance")]
    return weights


def outputs_in_loss(function: Function, case: Case, inputs: dict[str, tf.Tensor]) -> list[tf.Tensor]:
    """Runs the op: [y], or [y, mean, variance] in mode "moving"."""
    options = {"epsilon": EPSILON, "is_training": case.mode != "inference", "activation": case.activation}
    options |= {"axis": -1} if case.layout == "NC" else {"data_format": case.layout}
    if case.residual:
        options["residual"] = inputs["residual"]
    if case.mode == "moving":
        options["exponential_avg_factor"] = MOVING_FACTOR
    statistics = (None, None) if case.mode == "training" else (inputs["mean"], inputs["variance"])
    outputs = function(inputs["x"], inputs["scale"], inputs["offset"], *statistics, **options)
    return list(outputs) if case.mode == "moving" else [outputs[0]]


def problem(
    function: Function, case: Case, inputs: dict[str, npt.NDArray[Any]], dtype: str, devices: set[str]
) -> Problem:
    """The op on data of `dtype`, as a function of the differentiated inputs; `devices` collects where y is computed."""
    names = case.differentiated

    def call(leaves: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        outputs = outputs_in_loss(function, case, dict(zip(names, leaves, strict=True)))
        device = tf.DeviceSpec.from_string(outputs[0].device)
        devices.add(f"{device.device_type}:{device.device_index}")
        return {f"outputs[{index}]": output for index, output in enumerate(outputs)}

    return Problem(call, names, [inputs[name] for name in names], [gradient_dtype(name, dtype) for name in names])


def numerical_gradients(problem: Problem, weights: list[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Central differences, one element at a time: for each differentiated input, the loss' gradient."""

    def derivative(index: int, place: int) -> float:
        probe = element(problem, index, place, weights)._replace(unit=1.0)
        return float(quotients(problem, probe, STEP).central[0])

    return {
        name: np.reshape([derivative(index, place) for place in range(value.size)], value.shape)
        for index, (name, value) in enumerate(zip(problem.names, problem.values, strict=True))
    }


def relative_error(analytic: npt.NDArray[Any] | None, numerical: npt.NDArray[Any]) -> float:
    """max |analytic - numerical| / max |numerical|; infinite if there is no analytic gradient."""
    if analytic is None:
        return math.inf
    return float(np.max(np.abs(analytic - numerical)) / np.max(np.abs(numerical)))


def check_op(
    case: Case, dtypes: Sequence[str] = DTYPES, *, seed: int = 0, function: Function | None = None
) -> list[Result]:
    """Compares numerical and analytic gradients of `tfops.fused_batch_norm` for one combination.

    The error of an input's gradient is max |analytic - numerical| / max |numerical|. It may be up to 1e-6 in float64,
    and up to eps(g) / 2 + 32 eps(float32) in the other dtypes, g being the gradient's own.

    Args:
        case: Layout, mode, activation and residual.
        dtypes: Dtypes of x, each one of `DTYPES`.
        seed: The seed of the inputs and weights, at least 0.
        function: What to check, with the signature of `tfops.fused_batch_norm`, which is the default.

    Returns:
        One result for each dtype.

    Raises:
        ValueError: A dtype is unknown.

    Examples:
        >>> from tfops import gradcheck
        >>> results = gradcheck.check_op(gradcheck.Case("NC", activation="relu"), ["float64", "bfloat16"])
        >>> [result.passed for result in results]
        [True, True]
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes must be among {DTYPES}, not {dtype!r}")
    function = fused_batch_norm if function is None else function
    rng = np.random.default_rng(seed)
    inputs = draw_inputs(case, rng)
    weights = draw_weights(case, rng)
    numerical = numerical_gradients(problem(function, case, inputs, "float64", set()), weights)
    results = []
    for dtype in dtypes:
        devices: set[str] = set()
        found = problem(function, case, inputs, dtype, devices).gradients(weights)
        errors = {name: relative_error(each, numerical[name]) for name, each in zip(numerical, found, strict=True)}
        tolerances = {name: tolerance(name, dtype) for name in numerical}
        results.append(Result(case, dtype, devices.pop(), errors, tolerances))
    return results


def format_row(case: Case, results: Sequence[Result]) -> str:
    """A line of the table: in each dtype the largest error, relative to its tolerance, and the input that has it."""
    activation, residual = str(case.activation).lower(), "with" if case.residual else "without"
    cells = []
    for result in results:
        worst = max(result.errors, key=lambda name: badness(result.errors[name] / result.tolerances[name]))
        cells.append(f"{result.errors[worst]:8.1e} {worst:<8}{' ' if result.passed else '!'}")
    verdict = "ok" if all(result.passed for result in results) else "FAILED"
    return f"{case.layout:<7}{case.mode:<11}{activation:<12}{residual:<9}" + " ".join(cells) + f"  {verdict}"


def badness(error: float) -> float:
    return math.inf if math.isnan(error) else error


def to_json(result: Result) -> dict[str, Any]:
    """The result as JSON's types; an error that is not finite becomes null."""
    return {
        "dtype": result.dtype,
        **dataclasses.asdict(result.case),
        "device": result.device,
        "errors": {name: error if math.isfinite(error) else None for name, error in result.errors.items()},
        "tolerances": result.tolerances,
        "passed": result.passed,
    }
