"""AlexNet in Keras: `python models/train.py alexnet_keras`. The same network as in alexnet_graph.py.

The network of A. Krizhevsky, I. Sutskever and G. Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", 2012, with batch norm where it had local response normalization: after the first two convolutions. Three of
its convolutions see half of the channels each, in two groups, which is why the model is not a list of layers but a
function: the functional API calls layers on tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import keras

from trainer.alexnet_options import (
    CONVOLUTIONS,
    DENSE,
    DROPOUT,
    WEIGHT_DECAY,
    Convolution,
    boundaries,
    parse,
    read_data,
    scaled,
)
from trainer.keras_training import run_model
from trainer.norms import norm_relu
from trainer.options import configure, run_main
from trainer.replicas import make_strategy
from trainer.runs import Run

# Read data and define parameters: alexnet_options.py. -----------------------------------------------------------------

# Define. --------------------------------------------------------------------------------------------------------------


def build_model(
    image_size: int = 227,
    classes: int = 1000,
    width: float = 1.0,
    norm: str = "tfops",
    synchronized: bool = False,
    dropout: float = DROPOUT,
) -> keras.Model:
    """The network.

    Args:
        image_size: Height and width, 67 or more.
        classes: Outputs.
        width: Of every layer, as a part of the original's.
        norm: One of `norms.NORMS`.
        synchronized: See `norms.norm_relu`.
        dropout: The rate in training.

    Returns:
        A model from images `[batch, image_size, image_size, 3]`, 0 to 1, to float32 logits `[batch, classes]`.
    """
    decay = {"kernel_regularizer": keras.regularizers.L2(WEIGHT_DECAY / 2)}
    inputs = keras.Input((image_size, image_size, 3))
    x = inputs
    for layer in CONVOLUTIONS:
        normalized = layer.normalized and norm != "none"
        x = convolve(x, layer, scaled(layer.filters, width, layer.groups), use_bias=not normalized, **decay)
        for each in norm_relu(norm if normalized else "none", synchronized and normalized):
            x = each(x)
        if layer.pooled:
            x = keras.layers.MaxPooling2D(3, 2)(x)
    x = keras.layers.Flatten()(x)
    for units in DENSE:
        x = keras.layers.Dense(scaled(units, width), activation="relu", **decay)(x)
        x = keras.layers.Dropout(dropout)(x)
    x = keras.layers.Dense(classes, **decay)(x)
    logits = keras.layers.Activation("linear", dtype="float32")(x)
    return keras.Model(inputs, logits, name="alexnet")


def convolve(x: keras.KerasTensor, layer: Convolution, filters: int, **arguments) -> keras.KerasTensor:
    """In groups, as the original's two GPUs: a Conv2D for each, for TensorFlow has no gradient of groups on a CPU."""
    arguments |= {"strides": layer.strides, "padding": layer.padding}
    if layer.groups == 1:
        return keras.layers.Conv2D(filters, layer.kernel, **arguments)(x)
    size = x.shape[-1] // layer.groups
    parts = [
        keras.layers.Conv2D(filters // layer.groups, layer.kernel, **arguments)(x[..., i * size : (i + 1) * size])
        for i in range(layer.groups)
    ]
    return keras.layers.Concatenate()(parts)


# Compile. -------------------------------------------------------------------------------------------------------------


def compile_model(model: keras.Model, steps: int, learning_rate: float = 0.01) -> None:
    """Stochastic gradient descent with momentum, as the paper's; the rate is divided by 10 twice on the way."""
    rates = [learning_rate, learning_rate / 10, learning_rate / 100]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(boundaries(steps), rates)
    model.compile(
        keras.optimizers.SGD(schedule, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


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
        model = build_model(options.image_size, options.classes, options.width, options.norm, synchronized)
        compile_model(model, options.epochs * data.steps, options.learning_rate)
        return model

    return run_model(build, data, options, {"model": "AlexNet", "style": "Keras", **options.settings}, strategy)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    return parse(argv, "keras")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_main(parse_arguments, configure, train, argv)


if __name__ == "__main__":
    sys.exit(main())
