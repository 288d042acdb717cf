"""MNIST in Keras: `python models/train.py mnist_keras`. The same network and training as in mnist_graph.py.

A Sequential model is a list of layers. `compile` says how it learns, `fit` is the training loop, `evaluate` the test;
callbacks log, save and restore.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import keras

from trainer.image_data import Batches, digit_batches
from trainer.keras_training import run_model
from trainer.norms import norm_relu
from trainer.options import (
    add_device_arguments,
    add_run_arguments,
    add_training_arguments,
    check_devices,
    configure,
    run_main,
)
from trainer.replicas import make_strategy
from trainer.runs import Run

# Read data and define parameters. -------------------------------------------------------------------------------------

HEIGHT = WIDTH = 28
CLASSES = 10
FILTERS = (32, 64)  # of the two convolutions
KERNEL = 3
UNITS = 128  # of the dense layer
DROPOUT = 0.3


def read_data(options: argparse.Namespace) -> Batches:
    """60,000 digits to train on and 10,000 to test on, as batches of images, 0 to 1, and labels."""
    return digit_batches(options.data, options.batch_size, options.seed, options.limit)


# Define. --------------------------------------------------------------------------------------------------------------


def build_model(norm: str = "tfops", synchronized: bool = False, dropout: float = DROPOUT) -> keras.Sequential:
    """The network.

    Args:
        norm: One of `norms.NORMS`.
        synchronized: See `norms.norm_relu`.
        dropout: The rate in training.

    Returns:
        A model from images `[batch, 28, 28, 1]`, 0 to 1, to float32 logits `[batch, 10]`.
    """
    # Where batch norm follows, its offset takes the bias' place; its mean would take a bias out again.
    bias = norm == "none"
    return keras.Sequential(
        [
            keras.Input((HEIGHT, WIDTH, 1)),
            keras.layers.Conv2D(FILTERS[0], KERNEL, padding="same", use_bias=bias),
            *norm_relu(norm, synchronized),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(FILTERS[1], KERNEL, padding="same", use_bias=bias),
            *norm_relu(norm, synchronized),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(UNITS, use_bias=bias),
            *norm_relu(norm, synchronized),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(CLASSES),
            keras.layers.Activation("linear", dtype="float32"),  # logits for the loss, whatever the precision
        ],
        name="mnist",
    )


# Compile. -------------------------------------------------------------------------------------------------------------


def compile_model(model: keras.Model, steps: int, learning_rate: float = 2e-3) -> None:
    """Adam, whose learning rate falls to 0 along half a cosine over `steps`; with float16, the loss is scaled."""
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps), epsilon=1e-7)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])


# Fit, evaluate, save, restore: keras_training.run_model, which knows nothing of this network. -------------------------


def train(options: argparse.Namespace) -> Run:
    """Trains and tests the network."""
    strategy = make_strategy(options)  # before anything that computes
    keras.utils.set_random_seed(options.seed)
    data = read_data(options)
    print(data.describe(), flush=True)
    keras.mixed_precision.set_global_policy(options.precision)

    def build(synchronized: bool) -> keras.Model:
        keras.utils.set_random_seed(options.seed)  # the same weights, however often it is built
        model = build_model(options.norm, synchronized)
        compile_model(model, options.epochs * data.steps, options.learning_rate)
        return model

    settings = {"model": "MNIST", "style": "Keras", "norm": options.norm, "precision": options.precision}
    return run_model(build, data, options, settings, strategy)


# The command line. ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a convolutional network on MNIST, in Keras.")
    parser.add_argument("--data", metavar="PATH", help="mnist.npz, or a folder of the four IDX files")
    add_training_arguments(parser, epochs=5, batch_size=128, rate=2e-3)
    add_run_arguments(parser, "runs/mnist_keras")
    add_device_arguments(parser, "keras")
    options = parser.parse_args(argv)
    check_devices(parser, options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_main(parse_arguments, configure, train, argv)


if __name__ == "__main__":
    sys.exit(main())
