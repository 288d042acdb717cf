"""AlexNet in the graph style: `python models/train.py alexnet_graph`.

The network of A. Krizhevsky, I. Sutskever and G. Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", 2012, with batch norm where it had local response normalization: after the first two convolutions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import keras
import tensorflow as tf

from trainer.alexnet_options import CONVOLUTIONS, DENSE, DROPOUT, WEIGHT_DECAY, boundaries, parse, read_data, scaled
from trainer.graph_session import Network, complete
from trainer.graph_session import train as run_session
from trainer.norms import graph_norm_relu
from trainer.options import configure, run_main
from trainer.runs import Run

v1 = tf.compat.v1

# 1. Read data and define parameters: alexnet_options.py. --------------------------------------------------------------


def build_graph(
    *,
    steps: int,
    image_size: int = 227,
    classes: int = 1000,
    width: float = 1.0,
    norm: str = "tfops",
    learning_rate: float = 0.01,
    precision: str = "float32",
    seed: int = 0,
    devices: tuple[str | None, str | None] = (None, None),
    dropout: float = DROPOUT,
) -> Network:
    """Describes everything.

    Args:
        steps: Of the whole training: the learning rate is divided by 10 twice on the way.
        image_size: Height and width, 67 or more.
        classes: Outputs.
        width: Of every layer, as a part of the original's.
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
            # 2. Placeholders. -----------------------------------------------------------------------------------------

            images = v1.placeholder(tf.float32, [None, image_size, image_size, 3], name="images")
            labels = v1.placeholder(tf.int32, [None], name="labels")
            training = v1.placeholder_with_default(False, [], name="training")  # reaches batch norm
            dropout_rate = v1.placeholder_with_default(0.0, [], name="dropout_rate")

            # 3. Weights and biases: made where the model below asks for them, by name. --------------------------------

            glorot, zeros = v1.glorot_uniform_initializer(), tf.zeros_initializer()

            def weights(name: str, shape: list[int]) -> tf.Tensor:
                return tf.cast(v1.get_variable(f"{name}/kernel", shape, initializer=glorot), compute)

            def bias(name: str, size: int) -> tf.Tensor:
                return tf.cast(v1.get_variable(f"{name}/bias", [size], initializer=zeros), compute)

            # 4. The model. --------------------------------------------------------------------------------------------

            x = tf.cast(images, compute)
            for number, layer in enumerate(CONVOLUTIONS, start=1):
                name = f"convolution_{number}"
                filters = scaled(layer.filters, width, layer.groups) // layer.groups
                normalized = layer.normalized and norm != "none"
                # In groups, as the original's two GPUs; each group has variables of its own, as in Keras.
                outputs = []
                for group, part in enumerate(tf.split(x, layer.groups, axis=-1), start=1):
                    scope = name if layer.groups == 1 else f"{name}_{group}"
                    kernel = weights(scope, [layer.kernel, layer.kernel, part.shape[-1], filters])
                    part = tf.nn.conv2d(part, kernel, layer.strides, layer.padding.upper())
                    outputs.append(part if normalized else part + bias(scope, filters))
                x = tf.concat(outputs, axis=-1)
                x = graph_norm_relu(x, training, norm, f"norm_{number}") if normalized else tf.nn.relu(x)
                if layer.pooled:
                    x = tf.nn.max_pool2d(x, 3, 2, padding="VALID")
            x = tf.reshape(x, [-1, x.shape[1] * x.shape[2] * x.shape[3]])
            for number, units in enumerate(DENSE, start=1):
                name, units = f"dense_{number}", scaled(units, width)
                x = tf.nn.relu(tf.matmul(x, weights(name, [x.shape[-1], units])) + bias(name, units))
                x = tf.nn.dropout(x, tf.cast(dropout_rate, compute))
            x = tf.matmul(x, weights("logits", [x.shape[-1], classes])) + bias("logits", classes)
            logits = tf.cast(x, tf.float32, name="logits_32")
            probabilities = tf.nn.softmax(logits, name="probabilities")

        # 5 to 9. Loss, optimizer, training op, initialization, event logs and savers. ---------------------------------

        def schedule(step: tf.Variable) -> tf.Tensor:
            rates = [learning_rate, learning_rate / 10, learning_rate / 100]
            return v1.train.piecewise_constant(step, [tf.constant(b, tf.int64) for b in boundaries(steps)], rates)

        return complete(
            images=images,
            labels=labels,
            training=training,
            dropout=dropout_rate,
            logits=logits,
            probabilities=probabilities,
            schedule=schedule,
            make_optimizer=lambda rate: v1.train.MomentumOptimizer(rate, momentum=0.9),
            device=devices[1],
            precision=precision,
            dropout_rate=dropout,
            weight_decay=WEIGHT_DECAY,
        )


# 10. A session that initializes, trains, prints, tests, saves and restores: graph_session.train. ----------------------


def train(options: argparse.Namespace) -> Run:
    """Trains and tests the network."""
    keras.utils.set_random_seed(options.seed)
    data = read_data(options)
    print(data.describe(), flush=True)
    network = build_graph(
        steps=options.epochs * data.steps,
        image_size=options.image_size,
        classes=options.classes,
        width=options.width,
        norm=options.norm,
        learning_rate=options.learning_rate,
        precision=options.precision,
        seed=options.seed,
        devices=tuple(options.split_devices or (options.device, options.device)),
    )
    run = Run(options.out, {"model": "AlexNet", "style": "graph", **options.settings}, options.resume)
    run.parameters = network.parameters
    run_session(network, data, options, run)
    return run


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    return parse(argv, "graph")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_main(parse_arguments, configure, train, argv)


if __name__ == "__main__":
    sys.exit(main())
