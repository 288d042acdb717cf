"""A training step of whole networks with Keras' batch norm and with tfops': `python benchmarks/keras_step.py`.

A step is one tf.function: forward pass, loss, gradients, SGD with momentum, in float32. It is timed from its call until
TensorFlow's devices are idle. Each network is built once and copied, weights and all, so that only batch norm differs:

    keras     keras.layers.BatchNormalization, and the network's own activations and additions
    xla       the same, compiled by XLA, unless --no-xla; for 224 x 224 with --xla only, since on a CPU it is slow
    tfops     tfops.keras.BatchNormalization in the place of each, and nothing else changed
    fused     tfops' with the activation and the addition that follow it in the same op
    xla_fused the same, compiled by XLA, where xla is
    without   no batch norm, activations and additions kept: what the step costs apart from batch norm

The steps of all variants alternate, one of each a round, each round in another order. Before, the outputs of tfops
and fused are compared with those of keras, in training and then in inference.

Columns: the median step in ms; batch norm's share of the step, which is (step - without) / step within a round, as the
median over the rounds and its standard error; how many times as fast as keras the whole step is, the median too; and
how many times as fast batch norm is, (keras - without) / (tfops - without), or a dash where one of the two is less than
twice its standard error. `without` has its activations and additions apart: those that are inside the batch norms of
`fused` count as batch norm only with what they cost beyond that.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

import tfops.keras

CLASSES = 1000
LEARNING_RATE = 1e-6  # the arithmetic is the same as with a larger one, and a network without batch norm stays finite
LEAST_ROUNDS = 5
TOLERANCE = 1e-3  # of the largest output; rounding errors grow through a hundred layers


class Estimate(NamedTuple):
    """A median over rounds; in JSON a list of the two."""

    median: float
    error: float  # standard error: 1.25 standard deviations / sqrt(rounds), these from the quartiles

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(1.25 * (high - low) / 1.35 / len(values) ** 0.5))


class Network(NamedTuple):
    """A network and the size of its step."""

    build: Callable[[], keras.Model]  # from images to logits, with Keras' batch norm
    shape: tuple[int, ...]  # of an image
    batch: int
    xla: bool  # by default with a variant compiled by XLA


def mnist() -> keras.Model:
    """Three convolutions and a dense layer, on MNIST's digits."""

    def norm_relu() -> list[keras.Layer]:
        return [keras.layers.BatchNormalization(momentum=0.8), keras.layers.ReLU()]

    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False),
            *norm_relu(),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False),
            *norm_relu(),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", use_bias=False),
            *norm_relu(),
            keras.layers.Flatten(),
            keras.layers.Dense(128, use_bias=False),
            *norm_relu(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )


def alexnet() -> keras.Model:
    """AlexNet for images of 64 x 64: its first convolution has stride 2. Batch norm in place of its local response
    normalization, before every relu."""

    def norm_relu() -> list[keras.Layer]:
        return [keras.layers.BatchNormalization(), keras.layers.ReLU()]

    def convolution(filters: int, size: int, strides: int = 1) -> list[keras.Layer]:
        return [keras.layers.Conv2D(filters, size, strides, padding="same", use_bias=False), *norm_relu()]

    def dense(units: int) -> list[keras.Layer]:
        return [keras.layers.Dense(units, use_bias=False), *norm_relu(), keras.layers.Dropout(0.5)]

    return keras.Sequential(
        [
            keras.Input((64, 64, 3)),
            *convolution(96, 11, strides=2),
            keras.layers.MaxPooling2D(3, 2),
            *convolution(256, 5),
            keras.layers.MaxPooling2D(3, 2),
            *convolution(384, 3),
            *convolution(384, 3),
            *convolution(256, 3),
            keras.layers.MaxPooling2D(3, 2),
            keras.layers.Flatten(),
            *dense(4096),
            *dense(4096),
            keras.layers.Dense(CLASSES),
        ]
    )


def application(name: str, pixels: int) -> Network:
    """A network of keras.applications, on a batch of 16."""
    shape = (pixels, pixels, 3)

    def build() -> keras.Model:
        make = getattr(keras.applications, name)
        return make(weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None)

    return Network(build, shape, batch=16, xla=pixels <= 64)


NETWORKS = {
    "mnist": Network(mnist, (28, 28, 1), batch=128, xla=True),
    "alexnet-64": Network(alexnet, (64, 64, 3), batch=16, xla=True),
    "resnet50-64": application("ResNet50", 64),
    "resnet50-224": application("ResNet50", 224),
    "mobilenetv2-64": application("MobileNetV2", 64),
    "mobilenetv2-224": application("MobileNetV2", 224),
}


# ----------------------------------------------------------------------------------------------------------------------
# The variants


def copy_variables(source: keras.Model, target: keras.Model) -> keras.Model:
    """`target` with the weights and random seeds of the layers of the same names."""
    for layer in target.layers:
        if layer.variables:
            for mine, theirs in zip(layer.variables, source.get_layer(layer.name).variables, strict=True):
                mine.assign(theirs)
    return target


def variants(model: keras.Model) -> dict[str, keras.Model]:
    """The networks to compare, by column. The given one is that of "keras"."""

    def skip_norm(layer: keras.Layer, inputs: Any, **arguments: Any) -> Any:
        return inputs if isinstance(layer, keras.layers.BatchNormalization) else layer(inputs, **arguments)

    return {
        "keras": model,
        "xla": copy_variables(model, keras.models.clone_model(model)),
        "tfops": tfops.keras.convert(model, fold=False, verbose=0),
        "fused": tfops.keras.convert(model, verbose=0),
        "xla_fused": tfops.keras.convert(model, verbose=0),
        "without": copy_variables(model, keras.models.clone_model(model, call_function=skip_norm)),
    }


def count(model: keras.Model, kind: type[keras.Layer]) -> int:
    return sum(isinstance(layer, kind) for layer in model.layers)


def check(models: dict[str, keras.Model], images: tf.Tensor) -> float:
    """The largest difference of outputs between keras and tfops or fused, in training and then, with the moving
    statistics of that, in inference; a fraction of the largest output."""
    worst = 0.0
    for training in (True, False):
        want = models["keras"](images, training=training)
        for name in ("tfops", "fused"):
            got = models[name](images, training=training)
            worst = max(worst, float(tf.reduce_max(tf.abs(got - want)) / tf.reduce_max(tf.abs(want))))
    return worst


def training_step(model: keras.Model, xla: bool) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The step, a function of images and labels to the loss."""
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=0.9)
    weights = model.trainable_variables
    optimizer.build(weights)

    @tf.function(jit_compile=xla)
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    return step


# ----------------------------------------------------------------------------------------------------------------------
# Timing


def seconds_of(step: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> float:
    """The time of one step."""
    start = time.perf_counter()
    step(*arguments)
    tf.test.experimental.sync_devices()
    return time.perf_counter() - start


def measure(name: str, xla: bool | None, budget: float) -> dict[str, Any]:
    """A network's row: its steps are timed for about `budget` seconds. None for `xla`: as the network has it."""
    network = NETWORKS[name]
    keras.utils.set_random_seed(0)
    built = network.build()
    original = keras.Model(built.inputs, built.outputs)  # functional, whatever the network was
    models = variants(original)
    random = np.random.default_rng(0)
    images = tf.constant(random.random((network.batch, *network.shape), np.float32))
    labels = tf.constant(random.integers(0, original.output_shape[-1], network.batch))
    error = check(models, images)

    if not (network.xla if xla is None else xla):
        del models["xla"], models["xla_fused"]
    steps = {column: training_step(model, xla=column.startswith("xla")) for column, model in models.items()}
    # These are traced and compiled first, and not counted.
    first = {column: seconds_of(step, images, labels) for column, step in steps.items()}
    seconds: dict[str, list[float]] = {column: [] for column in steps}
    end = time.perf_counter() + budget
    while len(seconds["keras"]) < LEAST_ROUNDS or time.perf_counter() < end:
        for column in random.permutation(list(steps)):
            seconds[column].append(seconds_of(steps[column], images, labels))

    norms = [layer for layer in models["fused"].layers if isinstance(layer, tfops.keras.BatchNormalization)]
    folded = [node.arguments.kwargs.get("folded", "add") for layer in norms for node in layer._inbound_nodes]
    return {
        "network": name,
        "image": network.shape,
        "batch": network.batch,
        "batch_norms": count(original, keras.layers.BatchNormalization),
        "folded_activations": sum(what != "add" for what in folded),
        "folded_additions": count(original, keras.layers.Add) - count(models["fused"], keras.layers.Add),
        "error": error,
        "first_seconds": first,
        **summarize(seconds),
    }


def summarize(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The figures of a row, from the time of every step. Steps of one round are compared with one another."""
    steps = {column: np.array(times) for column, times in seconds.items()}
    without = steps["without"]
    norm = {column: Estimate.of(steps[column] - without) for column in ("keras", "tfops", "fused")}
    clear = {column: estimate.median > 2 * estimate.error for column, estimate in norm.items()}
    return {
        "rounds": len(without),
        "step": {column: Estimate.of(times) for column, times in steps.items()},
        "norm": norm,
        "share": {column: Estimate.of(1 - without / steps[column]) for column in norm},
        "step_ratio": {column: Estimate.of(steps["keras"] / steps[column]) for column in ("tfops", "fused")},
        "norm_ratio": {
            column: norm["keras"].median / norm[column].median if clear["keras"] and clear[column] else None
            for column in ("tfops", "fused")
        },
    }


# ----------------------------------------------------------------------------------------------------------------------
# Output

COLUMNS = ("keras", "xla", "tfops", "fused", "xla_fused", "without")


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown, a line for each network."""
    names = ["network", "image", "batch", "rounds"]
    names += [f"{column}, ms" for column in COLUMNS]
    names += [f"share, {column}" for column in ("keras", "tfops", "fused")]
    names += [f"{what}, {column}" for what in ("step", "batch norm") for column in ("tfops", "fused")]
    lines = [f"## {title}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        values = [row["network"], "x".join(map(str, row["image"])), row["batch"], row["rounds"]]
        step = row["step"]
        values += [f"{step[column].median * 1e3:.1f}" if column in step else "" for column in COLUMNS]
        values += [f"{share.median:.1%} ± {share.error:.1%}" for share in row["share"].values()]
        values += [f"{ratio.median:.2f}" for ratio in row["step_ratio"].values()]
        values += [f"{ratio:.2f}" if ratio else "-" for ratio in row["norm_ratio"].values()]
        lines.append("| " + " | ".join(map(str, values)) + " |")
    lines += [
        "",
        "Share: batch norm's, (step - without) / step. Then how many times as fast as keras, step and batch norm.",
    ]
    return "\n".join(lines) + "\n"


def chart(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws the step with Keras' layers and with tfops', and batch norm's part of each, as an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "tfops", "svg.fonttype": "none", "font.size": 9})
    figure = Figure((7.5, 0.6 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        step = {column: estimate.median for column, estimate in row["step"].items()}
        for column, offset, color in (("keras", 0.19, "#8c96a3"), ("fused", -0.19, "#e8710a")):
            rest = min(step["without"], step[column])
            for left, width, alpha in ((0.0, rest, 0.45), (rest, step[column] - rest, 1.0)):
                axes.barh(place + offset, width / step["keras"], 0.34, left / step["keras"], color=color, alpha=alpha)
            ratio = "" if column == "keras" else f", {row['step_ratio'][column].median:.2f} times as fast"
            label = f"{step[column] * 1e3:.0f} ms{ratio}"
            axes.text(step[column] / step["keras"] + 0.01, place + offset, label, va="center", fontsize=8)
    names = [f"{row['network'].partition('-')[0]} {row['image'][0]}x{row['image'][1]}" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlim=(0, 1.13), xlabel="time of a training step, as a part of that with Keras' layer")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.barh(0, 0, color=color) for color in ("#8c96a3", "#e8710a")]
    figure.legend(
        [*handles, axes.barh(0, 0, color="#8c96a3", alpha=0.45)],
        ["batch norm, Keras' layer", "batch norm, tfops, fused", "the rest of the step"],
        loc="outside upper center",
        ncols=3,
        frameon=False,
        title=title,
        title_fontsize=8,
    )
    figure.savefig(path, metadata={"Date": None})


def device_name() -> str:
    """Of the GPU that TensorFlow computes on, or else of the processor."""
    for gpu in tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(gpu)["device_name"]
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--seconds", type=float, default=60, help="to time each network's steps for (default: 60)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of TensorFlow (default: one a core)")
    parser.add_argument(
        "--xla", action=argparse.BooleanOptionalAction, help="compile with XLA too (default: but for 224 x 224)"
    )
    parser.add_argument("--out", type=Path, help="write FILE.json, FILE.md and FILE.svg", metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    tf.get_logger().setLevel("ERROR")  # or it warns of every variant's tracing
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    rows = []
    for name in arguments.network:
        print(name, file=sys.stderr, flush=True)
        rows.append(measure(name, arguments.xla, arguments.seconds))
        keras.backend.clear_session(free_memory=True)
    report = {
        "device": device_name(),
        "threads": arguments.threads,
        "date": datetime.date.today().isoformat(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "tfops": tfops.__version__,
        "rows": rows,
    }
    title = "{device}, {threads} threads, TensorFlow {tensorflow}, Keras {keras}, tfops {tfops}, {date}"
    text = table(rows, title.format_map(report))
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
        arguments.out.with_suffix(".md").write_text(text)
        if importlib.util.find_spec("matplotlib"):
            chart(rows, title.format_map(report), arguments.out.with_suffix(".svg"))
    wrong = [row for row in rows if not row["error"] <= TOLERANCE]
    for row in wrong:
        print(f"keras_step.py: outputs differ by {row['error']:.1e} in {row['network']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
