"""The same network with one batch norm after another: `python models/train.py compare mnist --norm all --style both`.

All start from the same weights, see the same batches in the same order, and differ in the batch norm alone (norms.py);
graph and Keras style draw other weights and other dropout. They are trained one after the other. The time per step is
the median over all training steps but the first `runs.WARM_UP`; a step ends when its loss is known, so a GPU's work is
counted too. What else the machine does meanwhile counts as well: compare times on an idle one only.

All other options are those of mnist_keras.py, mnist_graph.py, alexnet_keras.py and alexnet_graph.py.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import keras

from trainer.norms import NORMS
from trainer.options import configure, run_main
from trainer.runs import Run

MODELS = ("mnist", "alexnet")
STYLES = ("keras", "graph")


def chosen_norms(text: str) -> list[str]:
    """An argument type: "all", or names from `NORMS`, separated by commas."""
    names = list(NORMS) if text == "all" else text.split(",")
    for name in names:
        if name not in NORMS:
            raise argparse.ArgumentTypeError(f"must be all, or some of {','.join(NORMS)}, not {name!r}")
    return names


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `options.runs` holds that of each run, by style and norm."""
    parser = argparse.ArgumentParser(
        description="Trains the same network with one batch norm after another, and prints a table.",
        epilog="All other options are those of the model: see models/train.py mnist_keras --help, and so on.",
        allow_abbrev=False,
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--norm", type=chosen_norms, default="tfops,keras", help=f"all, or some of {','.join(NORMS)} (tfops,keras)"
    )
    parser.add_argument("--style", choices=("both", *STYLES), default="keras", help="(default: keras)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs (runs/compare)")
    options, rest = parser.parse_known_args(argv)
    options.runs = {}
    for style in STYLES if options.style == "both" else (options.style,):
        parse = importlib.import_module(f"trainer.{options.model}_{style}").parse_arguments
        for norm in options.norm:
            out = options.out / f"{options.model}_{style}_{norm}"
            options.runs[style, norm] = parse([*rest, "--norm", norm, "--out", str(out)])
    return options


def compare(options: argparse.Namespace) -> None:
    """Trains all, and prints the table."""
    results: dict[tuple[str, str], Run] = {}
    for (style, norm), each in options.runs.items():
        print(f"{options.model} with {norm}, {style} style", flush=True)
        keras.backend.clear_session()
        results[style, norm] = importlib.import_module(f"trainer.{options.model}_{style}").train(each)
        print(flush=True)
    print(f"{'norm':<8}{'style':<8}{'test accuracy':>15}{'ms per step':>14}{'parameters':>13}")
    for (style, norm), run in results.items():
        accuracy = run.epochs[-1]["test_accuracy"]
        print(f"{norm:<8}{style:<8}{accuracy:>15.2%}{run.ms_per_step:>14.2f}{run.parameters:>13,}")
    if len(results) == 2:
        (one, other), (first, second) = results, results.values()
        points = 100 * (first.epochs[-1]["test_accuracy"] - second.epochs[-1]["test_accuracy"])
        names = [" ".join(reversed(name)) if one[0] != other[0] else name[1] for name in (one, other)]
        print(f"\n{names[0]} against {names[1]}: {points:+.2f} points of accuracy")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_main(parse_arguments, lambda options: configure(next(iter(options.runs.values()))), compare, argv)


if __name__ == "__main__":
    sys.exit(main())
