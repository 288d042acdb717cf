"""Runs the programs of the package trainer: `python models/train.py PROGRAM [--help]`.

mnist_graph, mnist_keras        train the network of the lesson of that name, with checkpoints, logs and a report
alexnet_graph, alexnet_keras    likewise
compare                         trains one network with one batch norm after another, and prints a table
predict                         says what is on an image, by a model that one of these has trained
"""

import importlib
import sys

PROGRAMS = ("mnist_graph", "mnist_keras", "alexnet_graph", "alexnet_keras", "compare", "predict")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        asked = sys.argv[1] if len(sys.argv) > 1 else ""
        sys.exit(f"{__doc__}\nPROGRAM must be one of {', '.join(PROGRAMS)}, not {asked!r}")
    program = sys.argv.pop(1)
    sys.argv[0] = f"train.py {program}"  # for messages and --help
    sys.exit(importlib.import_module(f"trainer.{program}").main())
