"""Inference of whole networks: as they are, converted, and folded: `python benchmarks/keras_inference.py`.

Each network of keras.applications is built once, in float32, and copied, so that only batch norm differs:

    stock      keras.layers.BatchNormalization
    converted  tfops.keras.convert: tfops' batch norms, with the activations and additions that follow in the same op
    folded     tfops.keras.fold: batch norms in the weights of convolutions where that can be, and the others converted

A call is one tf.function of the model in inference, timed from its call until TensorFlow's devices are idle. The calls
of all variants alternate, one of each a round, each round in another order. Before, the outputs are compared.

Columns: how many of the batch norms went into weights; the median call in ms; and how many times as fast as stock it
is, which is the median of the ratios within a round, and its standard error.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

import tfops.keras
from keras_step import LEAST_ROUNDS, Estimate, count, device_name, seconds_of

NETWORKS = ("ResNet50", "ResNet50V2", "MobileNetV2", "EfficientNetB0", "DenseNet121")
COLUMNS = ("stock", "converted", "folded")
TOLERANCE = 1e-4  # of the largest output


def variants(name: str, pixels: int) -> dict[str, keras.Model]:
    """The network with random weights and moving statistics, and its copies, by column."""
    keras.utils.set_random_seed(0)
    stock = getattr(keras.applications, name)(weights=None, input_shape=(pixels, pixels, 3))
    random = np.random.default_rng(0)
    for variable in stock.variables:
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean"):
            variable.assign(random.normal(0, 0.1, variable.shape))
    return {
        "stock": stock,
        "converted": tfops.keras.convert(stock, verbose=0),
        "folded": tfops.keras.fold(stock, verbose=0),
    }


def measure(name: str, models: dict[str, keras.Model], batch: int, xla: bool, budget: float) -> dict[str, Any]:
    """A row: calls are timed for about `budget` seconds."""
    random = np.random.default_rng(0)
    images = tf.constant(random.random((batch, *models["stock"].input_shape[1:]), np.float32))

    def inference(model: keras.Model) -> Any:
        return tf.function(lambda x: model(x, training=False), jit_compile=xla)

    calls = {column: inference(model) for column, model in models.items()}
    outputs = {column: call(images) for column, call in calls.items()}  # traced and compiled here, and not timed
    largest = tf.reduce_max(tf.abs(outputs["stock"]))
    error = max(float(tf.reduce_max(tf.abs(each - outputs["stock"])) / largest) for each in outputs.values())
    seconds: dict[str, list[float]] = {column: [] for column in calls}
    end = time.perf_counter() + budget
    while len(seconds["stock"]) < LEAST_ROUNDS or time.perf_counter() < end:
        for column in random.permutation(list(calls)):
            seconds[column].append(seconds_of(calls[column], images))
    times = {column: np.array(each) for column, each in seconds.items()}
    norms, kept = (count(models[column], keras.layers.BatchNormalization) for column in ("stock", "folded"))
    return {
        "network": name,
        "image": models["stock"].input_shape[1:],
        "batch": batch,
        "batch_norms": norms,
        "into_weights": norms - kept,
        "error": error,
        "rounds": len(times["stock"]),
        "call": {column: Estimate.of(each) for column, each in times.items()},
        "ratio": {column: Estimate.of(times["stock"] / times[column]) for column in COLUMNS[1:]},
    }


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown, a line for each network and batch."""
    names = ["network", "image", "batch", "batch norms", "into weights", "rounds"]
    names += [f"{column}, ms" for column in COLUMNS] + [f"times as fast, {column}" for column in COLUMNS[1:]]
    lines = [f"## {title}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        values = [row["network"], "x".join(map(str, row["image"])), row["batch"], row["batch_norms"]]
        values += [row["into_weights"], row["rounds"]]
        values += [f"{row['call'][column].median * 1e3:.1f}" for column in COLUMNS]
        values += [f"{ratio.median:.2f} ± {ratio.error:.2f}" for ratio in row["ratio"].values()]
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines) + "\n"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), help="of keras.applications")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32], help="default: 1 32")
    parser.add_argument("--pixels", type=int, default=224, help="of an image's side (default: 224)")
    parser.add_argument("--seconds", type=float, default=20, help="to time each network and batch for (default: 20)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of TensorFlow (default: one a core)")
    parser.add_argument("--xla", action="store_true", help="compile all with XLA")
    parser.add_argument("--out", type=Path, help="write FILE.json and FILE.md", metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    tf.get_logger().setLevel("ERROR")
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    rows = []
    for name in arguments.network:
        print(name, file=sys.stderr, flush=True)
        models = variants(name, arguments.pixels)
        rows += [measure(name, models, batch, arguments.xla, arguments.seconds) for batch in arguments.batch]
        del models
        keras.backend.clear_session(free_memory=True)
    report = {
        "device": device_name(),
        "threads": arguments.threads,
        "xla": arguments.xla,
        "date": datetime.date.today().isoformat(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "tfops": tfops.__version__,
        "rows": rows,
    }
    title = "{device}, {threads} threads, TensorFlow {tensorflow}, Keras {keras}, tfops {tfops}, {date}"
    text = table(rows, title.format_map(report) + (", XLA" if arguments.xla else ""))
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
        arguments.out.with_suffix(".md").write_text(text)
    wrong = [row for row in rows if not row["error"] <= TOLERANCE]
    for row in wrong:
        print(f"keras_inference.py: outputs differ by {row['error']:.1e} in {row['network']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
