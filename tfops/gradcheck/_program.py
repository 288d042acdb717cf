"""The program `python -m tfops.gradcheck`: tfops' own op in every combination, or any function."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfops._arguments import ACTIVATIONS, activation_argument
from tfops.gradcheck._check import check
from tfops.gradcheck._op import (
    DTYPES,
    LAYOUTS,
    MODES,
    Case,
    Result,
    badness,
    check_op,
    format_row,
    to_json,
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line, checked; sys.argv's if argv is None."""
    parser = argparse.ArgumentParser(
        prog="python -m tfops.gradcheck",
        description="Checks the gradients of tfops.fused_batch_norm, or those of any function, against difference "
        "quotients. Exit status: 0 if all agree, 1 if any does not, 2 for bad arguments.",
    )
    choices: dict[str, list[str]] = {}

    def activation(text: str) -> str:
        try:
            return text if text == "none" else str(activation_argument(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def choice(flag: str, values: Sequence[str], text: str) -> None:
        choices[flag.removeprefix("--")] = list(values)
        parser.add_argument(flag, nargs="+", choices=values, help=f"{text} (default: all)")

    parser.add_argument(
        "--function",
        metavar="MODULE:NAME",
        help="check this in place of the op: NAME is, or returns without arguments, a tuple (function, inputs) or a "
        "dict of the arguments of tfops.gradcheck.check",
    )
    choice("--dtype", DTYPES, "dtypes of x")
    choice("--layout", LAYOUTS, "4-D NHWC, 4-D NCHW, 2-D")
    choice("--mode", MODES, "'moving': training with exponential_avg_factor < 1, mean and variance in the loss")
    choices["activation"] = [str(each).lower() for each in ACTIVATIONS]
    parser.add_argument(
        "--activation",
        nargs="+",
        type=activation,
        metavar="NAME",
        help=f"fused activations, with or without parameters (default: {', '.join(choices['activation'])})",
    )
    choice("--residual", ("without", "with"), "without or with a fused residual")
    parser.add_argument("--device", metavar="NAME", help="such as cpu, gpu or gpu:1 (default: TensorFlow's)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="also write every combination's errors to FILE")
    arguments = parser.parse_args(argv)

    for name, values in choices.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, values)
        elif arguments.function is not None:
            parser.error(f"argument --{name}: means nothing beside --function")
    if arguments.function is not None:
        try:
            arguments.function = load(arguments.function)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            parser.error(f"argument --function: {error}")
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


def load(target: str) -> dict[str, Any]:
    """The arguments of `check` that MODULE:NAME is, or returns.

    Raises:
        AttributeError: The module has no such name.
        ImportError: There is no such module.
        TypeError: It is something else.
        ValueError: The target is not of this form.
    """
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise ValueError(f"must be MODULE:NAME, not {target!r}")
    found = getattr(importlib.import_module(module), name)
    found = found() if callable(found) else found
    if isinstance(found, tuple) and len(found) == 2:
        return dict(zip(("function", "inputs"), found, strict=True))
    if isinstance(found, dict) and {"function", "inputs"} <= found.keys():
        return found
    raise TypeError(f"{target} must be (function, inputs) or a dict of check's arguments, but it is {found!r}")


def check_function(arguments: argparse.Namespace) -> int:
    """Checks a function of the user's, prints the table, and returns the exit status."""
    options = {"seed": arguments.seed, **arguments.function}
    with tf.device(arguments.device):
        report = check(options.pop("function"), **options)
    print(report)
    if arguments.json is not None:
        rows = [dataclasses.asdict(row) for row in report.rows]
        finite = [{key: None if _is_not_finite(value) else value for key, value in row.items()} for row in rows]
        content = {"tensorflow": tf.__version__, "function": report.function, "passed": report.ok, "rows": finite}
        with open(arguments.json, "w") as file:
            json.dump(content, file, indent=1)
    return 0 if report else 1


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks all combinations of the op, or those that the options choose, and prints a line for each.

    With `--function`, checks another function and prints the table of its report.

    Args:
        argv: The options of `python -m tfops.gradcheck`, which `--help` lists. None means those of sys.argv.

    Returns:
        The exit status: 0 if all derivatives agree, 1 if any does not.

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
    if arguments.function is not None:
        return check_function(arguments)
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
            row = check_op(case, arguments.dtype, seed=arguments.seed)
        print(format_row(case, row), flush=True)
        results += row
    seconds = time.perf_counter() - start

    failures = [result for result in results if not result.passed]
    print()
    for dtype in arguments.dtype:
        ones = [result for result in results if result.dtype == dtype]
        error = max((error for result in ones for error in result.errors.values()), key=badness)
        share = max((result.worst for result in ones), key=badness)
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
