"""The program `python -m tfops.gradcheck`: numerical against analytic gradients of `tfops.fused_batch_norm`.

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

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfops import _activations, fused_batch_norm
from tfops._arguments import ACTIVATIONS

__all__ = ["Case", "Result", "check", "main"]

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
        for name, allowed in (("layout", LAYOUTS), ("mode", MODES), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")

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
    """What `check` found for one case in one dtype.

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


def draw_inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws the inputs of a problem, with every activation argument away from the kinks.

    Args:
        case: The combination.
        rng: Where the numbers come from.

    Returns:
        x and residual of shape `SHAPES[case.layout]`; scale, offset, mean and variance of shape `[channels]`; all
        float64 multiples of 1/32 of magnitude below 8.
    """

    def grid(values: np.ndarray | float) -> np.ndarray:
        return np.round(np.asarray(values) * 32) / 32

    shape = SHAPES[case.layout]
    channels = shape[case.channel_axis]
    count = math.prod(shape) // channels
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
        clear = all(np.all(np.abs(z - kink) > KINK_MARGIN) for kink in KINKS)
        pieces = np.any(z < 0) and np.any((z > 0) & (z < 6)) and np.any(z > 6)
        if clear and pieces:
            columns.append((x, scale, offset, residual, mean, variance))

    x, scale, offset, residual, mean, variance = (np.stack(values, axis=-1) for values in zip(*columns, strict=True))
    others = [size for axis, size in enumerate(shape) if axis != case.channel_axis]
    x, residual = (np.moveaxis(data.reshape(*others, channels), -1, case.channel_axis) for data in (x, residual))
    return {"x": x, "scale": scale, "offset": offset, "residual": residual, "mean": mean, "variance": variance}


def draw_weights(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
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


def numerical_gradients(
    function: Function, case: Case, inputs: dict[str, np.ndarray], weights: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """Central differences in float64, one element at a time.

    Returns:
        For each differentiated input, the loss' gradient: float64, of the input's shape.
    """
    tensors = {name: tf.constant(value) for name, value in inputs.items()}
    gradients = {}
    for name in case.differentiated:
        gradients[name] = np.zeros_like(inputs[name])
        for index in np.ndindex(inputs[name].shape):
            sides = []
            for step in (STEP, -STEP):
                perturbed = inputs[name].copy()
                perturbed[index] += step
                outputs = outputs_in_loss(function, case, tensors | {name: tf.constant(perturbed)})
                sides.append([output.numpy() for output in outputs])
            # Outputs are subtracted before they are summed: most do not depend on the element and cancel exactly.
            difference = sum(np.sum(w * (above - below)) for w, above, below in zip(weights, *sides, strict=True))
            gradients[name][index] = difference / (2 * STEP)
    return gradients


def analytic_gradients(
    function: Function, case: Case, inputs: dict[str, np.ndarray], weights: list[np.ndarray], dtype: str
) -> tuple[dict[str, np.ndarray | None], str]:
    """The op's own gradients with data of `dtype`, and the device that y was computed on.

    Returns:
        For each differentiated input, the loss' gradient as float64, of the input's shape, or None if the op gives
        none; the device's name.
    """
    tensors = {name: tf.constant(value, gradient_dtype(name, dtype)) for name, value in inputs.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = outputs_in_loss(function, case, tensors)
    upstream = [tf.constant(w, output.dtype) for w, output in zip(weights, outputs, strict=True)]
    sources = {name: tensors[name] for name in case.differentiated}
    gradients = tape.gradient(outputs, sources, output_gradients=upstream)
    device = tf.DeviceSpec.from_string(outputs[0].device)
    return (
        {name: None if g is None else tf.cast(g, tf.float64).numpy() for name, g in gradients.items()},
        f"{device.device_type}:{device.device_index}",
    )


def relative_error(analytic: np.ndarray | None, numerical: np.ndarray) -> float:
    """max |analytic - numerical| / max |numerical|; infinite if there is no analytic gradient."""
    if analytic is None:
        return math.inf
    return float(np.max(np.abs(analytic - numerical)) / np.max(np.abs(numerical)))


def check(
    case: Case, dtypes: Sequence[str] = DTYPES, *, seed: int = 0, function: Function | None = None
) -> list[Result]:
    """Compares numerical and analytic gradients for one combination.

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
        >>> results = gradcheck.check(gradcheck.Case("NC", activation="relu"), ["float64", "bfloat16"])
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
    numerical = numerical_gradients(function, case, inputs, weights)
    results = []
    for dtype in dtypes:
        analytic, device = analytic_gradients(function, case, inputs, weights, dtype)
        errors = {name: relative_error(analytic[name], numerical[name]) for name in numerical}
        tolerances = {name: tolerance(name, dtype) for name in numerical}
        results.append(Result(case, dtype, device, errors, tolerances))
    return results


def format_row(case: Case, results: Sequence[Result]) -> str:
    """A line of the table: in each dtype the largest error, relative to its tolerance, and the input that has it."""
    activation, residual = str(case.activation).lower(), "with" if case.residual else "without"
    cells = []
    for result in results:
        worst = max(result.errors, key=lambda name: _badness(result.errors[name] / result.tolerances[name]))
        cells.append(f"{result.errors[worst]:8.1e} {worst:<8}{' ' if result.passed else '!'}")
    verdict = "ok" if all(result.passed for result in results) else "FAILED"
    return f"{case.layout:<7}{case.mode:<11}{activation:<12}{residual:<9}" + " ".join(cells) + f"  {verdict}"


def _badness(error: float) -> float:
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line, checked; sys.argv's if argv is None."""
    parser = argparse.ArgumentParser(
        prog="python -m tfops.gradcheck",
        description="Checks the gradients of tfops.fused_batch_norm against difference quotients. "
        "Exit status: 0 if all agree, 1 if any does not, 2 for bad arguments.",
    )

    def choice(flag: str, values: Sequence[str], text: str) -> None:
        parser.add_argument(flag, nargs="+", choices=values, default=list(values), help=f"{text} (default: all)")

    choice("--dtype", DTYPES, "dtypes of x")
    choice("--layout", LAYOUTS, "4-D NHWC, 4-D NCHW, 2-D")
    choice("--mode", MODES, "'moving': training with exponential_avg_factor < 1, mean and variance in the loss")
    choice("--activation", [str(each).lower() for each in ACTIVATIONS], "fused activations")
    choice("--residual", ("without", "with"), "without or with a fused residual")
    parser.add_argument("--device", metavar="NAME", help="such as cpu, gpu or gpu:1 (default: TensorFlow's)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="also write every combination's errors to FILE")
    arguments = parser.parse_args(argv)

    if arguments.seed < 0:
        parser.error(f"argument --seed: must be at least 0, not {arguments.seed}")
    if arguments.device is not None:
        name = arguments.device.upper().removeprefix("/").removeprefix("DEVICE:")
        name = name if ":" in name else f"{name}:0"
        available = [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices()]
        if name not in available:
            parser.error(f"argument --device: no {arguments.device!r} here, only {', '.join(available)}")
        arguments.device = name
    if arguments.json is not None:
        try:
            open(arguments.json, "w").close()  # now, not after a minute's work
        except OSError as error:
            parser.error(f"argument --json: cannot write {arguments.json!r}: {error.strerror}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Checks all combinations, or those that the options choose, and prints a line for each.

    Args:
        argv: The options of `python -m tfops.gradcheck`, which `--help` lists. None means those of sys.argv.

    Returns:
        The exit status: 0 if all gradients agree, 1 if any does not.

    Raises:
        SystemExit: An option is wrong (with code 2), or asks for help.

    Examples:
        >>> from tfops import gradcheck
        >>> options = "--layout NC --mode inference --activation silu --residual with --dtype float64"
        >>> gradcheck.main(options.split())  # doctest: +ELLIPSIS
        Largest relative error of any input's gradient, ...
        1 of 1 combinations passed on ...
        0
    """
    arguments = parse_arguments(argv)
    activations = [None if name == "none" else name for name in arguments.activation]
    residuals = [name == "with" for name in arguments.residual]

    start = time.perf_counter()
    print("Largest relative error of any input's gradient, and which input's it is; ! beyond its tolerance:\n")
    print(f"{'layout':<7}{'mode':<11}{'activation':<12}{'residual':<9}", end="")
    print(" ".join(f"{dtype:<18}" for dtype in arguments.dtype))
    results: list[Result] = []
    for layout, mode, activation, residual in itertools.product(
        arguments.layout, arguments.mode, activations, residuals
    ):
        case = Case(layout, mode, activation, residual)
        with tf.device(arguments.device):
            row = check(case, arguments.dtype, seed=arguments.seed)
        print(format_row(case, row), flush=True)
        results += row
    seconds = time.perf_counter() - start

    failures = [result for result in results if not result.passed]
    print()
    for dtype in arguments.dtype:
        ones = [result for result in results if result.dtype == dtype]
        error = max((error for result in ones for error in result.errors.values()), key=_badness)
        share = max((result.worst for result in ones), key=_badness)
        print(f"{dtype:<9} largest error {error:.1e}, at most {share:.2g} of the tolerance")
    if arguments.json is not None:
        report = {
            "tensorflow": tf.__version__,
            "seed": arguments.seed,
            "seconds": round(seconds, 1),
            "passed": not failures,
            "results": [to_json(result) for result in results],
        }
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)
    devices = {result.device for result in results}
    misplaced = devices - {arguments.device} if arguments.device is not None else set()
    if misplaced:
        print(f"\nFAILED: TensorFlow ran the op on {', '.join(misplaced)}: it has no kernel for {arguments.device}")
    passed = f"{len(results) - len(failures)} of {len(results)} combinations passed"
    print(f"\n{passed} on {' and '.join(sorted(devices))} in {seconds:.0f} s")
    return 1 if failures or misplaced else 0


if __name__ == "__main__":
    sys.exit(main())
