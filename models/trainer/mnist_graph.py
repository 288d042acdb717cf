"""MNIST in the graph style: `python models/train.py mnist_graph`.

A program of this style has two parts. First it describes a computation as a graph: placeholders for what comes in,
variables for what is learned, ops in between. Nothing is computed meanwhile. Then a session initializes the variables
and runs parts of the graph, as often as it takes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

import keras
import tensorflow as tf

from trainer.graph_session import Network, complete
from trainer.graph_session import train as run_session
from trainer.image_data import Batches, digit_batches
from trainer.norms import graph_norm_relu
from trainer.options import (
    add_device_arguments,
    add_run_arguments,
    add_training_arguments,
    check_devices,
    configure,
    run_main,
)
from trainer.runs import Run

v1 = tf.compat.v1

# 1. Read data and define parameters. ----------------------------------------------------------------------------------

HEIGHT = WIDTH = 28
CLASSES = 10
FILTERS = (32, 64)  # of the two convolutions
KERNEL = 3
UNITS = 128  # of the dense layer
DROPOUT = 0.3


def read_data(options: argparse.Namespace) -> Batches:
    """60,000 digits to train on and 10,000 to test on, as batches of images, 0 to 1, and labels."""
    return digit_batches(options.data, options.batch_size, options.seed, options.limit)


def build_graph(
    *,
    steps: int,
    norm: str = "tfops",
    learning_rate: float = 2e-3,
    precision: str = "float32",
    seed: int = 0,
    devices: tuple[str | None, str | None] = (None, None),
    dropout: float = DROPOUT,
) -> Network:
    """Describes everything.

    Args:
        steps: Of the whole training: the learning rate falls to 0 along half a cosine.
        norm: One of `norms.NORMS`.
        learning_rate: At the beginning.
        precision: "float32"; or "mixed_bfloat16" or "mixed_float16", where activations have 16 bits and variables 32.
        seed: Of initial values and dropout.
        devices: Of the graph and its variables, and of loss and optimization; None: TensorFlow's choice.
        dropout: The rate in training.
    """
    graph = tf.Graph()
    with graph.as_default():
        v1.set_random_seed(seed)
        compute = tf.as_dtype(precision.removeprefix("mixed_"))
        with tf.device(devices[0]):
            # 2. Placeholders: what every run of the session may feed. Those with a default need not be fed. -----------

            images = v1.placeholder(tf.float32, [None, HEIGHT, WIDTH, 1], name="images")
            labels = v1.placeholder(tf.int32, [None], name="labels")
            training = v1.placeholder_with_default(False, [], name="training")  # reaches batch norm
            dropout_rate = v1.placeholder_with_default(0.0, [], name="dropout_rate")

            # 3. Weights and biases. -----------------------------------------------------------------------------------

            # The convolutions have none of the latter, nor has the dense layer: batch norm's offset takes their place,
            # and its mean would take a bias out again. norms.py makes batch norm's own variables.
            glorot = v1.glorot_uniform_initializer()
            size = HEIGHT // 4 * (WIDTH // 4) * FILTERS[1]  # after two poolings
            kernel_1 = v1.get_variable("convolution_1/kernel", [KERNEL, KERNEL, 1, FILTERS[0]], initializer=glorot)
            kernel_2 = v1.get_variable(
                "convolution_2/kernel", [KERNEL, KERNEL, FILTERS[0], FILTERS[1]], initializer=glorot
            )
            kernel_3 = v1.get_variable("dense/kernel", [size, UNITS], initializer=glorot)
            kernel_4 = v1.get_variable("logits/kernel", [UNITS, CLASSES], initializer=glorot)
            bias_4 = v1.get_variable("logits/bias", [CLASSES], initializer=tf.zeros_initializer())

            # 4. The model. --------------------------------------------------------------------------------------------

            x = tf.cast(images, compute)
            for number, kernel in enumerate((kernel_1, kernel_2), start=1):
                x = tf.nn.conv2d(x, tf.cast(kernel, compute), strides=1, padding="SAME")
                x = graph_norm_relu(x, training, norm, f"norm_{number}")
                x = tf.nn.max_pool2d(x, 2, 2, padding="VALID")
            x = tf.reshape(x, [-1, size])
            x = graph_norm_relu(tf.matmul(x, tf.cast(kernel_3, compute)), training, norm, "norm_3")
            x = tf.nn.dropout(x, tf.cast(dropout_rate, compute))
            x = tf.matmul(x, tf.cast(kernel_4, compute)) + tf.cast(bias_4, compute)
            logits = tf.cast(x, tf.float32, name="logits_32")
            probabilities = tf.nn.softmax(logits, name="probabilities")

        # 5 to 9. Loss, optimizer, training op, initialization, event logs and savers. ---------------------------------

        def schedule(step: tf.Variable) -> tf.Tensor:
            return learning_rate * 0.5 * (1 + tf.cos(math.pi * tf.minimum(tf.cast(step, tf.float32) / steps, 1.0)))

        return complete(
            images=images,
            labels=labels,
            training=training,
            dropout=dropout_rate,
            logits=logits,
            probabilities=probabilities,
            schedule=schedule,
            make_optimizer=lambda rate: v1.train.AdamOptimizer(rate, epsilon=1e-7),  # Keras' epsilon
            device=devices[1],
            precision=precision,
            dropout_rate=dropout,
        )


# 10. A session that initializes, trains, prints, tests, saves and restores: graph_session.train, which knows nothing of
#     this network but what `Network` names. ---------------------------------------------------------------------------


def train(options: argparse.Namespace) -> Run:
    """Trains and tests the network."""
    keras.utils.set_random_seed(options.seed)
    data = read_data(options)
    print(data.describe(), flush=True)
    network = build_graph(
        steps=options.epochs * data.steps,
        norm=options.norm,
        learning_rate=options.learning_rate,
        precision=options.precision,
        seed=options.seed,
        devices=tuple(options.split_devices or (options.device, options.device)),
    )
    settings = {"model": "MNIST", "style": "graph", "norm": options.norm, "precision": options.precision}
    run = Run(options.out, settings, options.resume)
    run.parameters = network.parameters
    run_session(network, data, options, run)
    return run


# The command line. ----------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a convolutional network on MNIST, in the graph style.")
    parser.add_argument("--data", metavar="PATH", help="mnist.npz, or a folder of the four IDX files")
    add_training_arguments(parser, epochs=5, batch_size=128, rate=2e-3)
    add_run_arguments(parser, "runs/mnist_graph")
    add_device_arguments(parser, "graph")
    options = parser.parse_args(argv)
    check_devices(parser, options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_main(parse_arguments, configure, train, argv)


if __name__ == "__main__":
    sys.exit(main())
