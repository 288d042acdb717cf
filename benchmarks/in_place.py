"""What `in_place=True` gives and costs: `python benchmarks/in_place.py errors`, `... memory` or `... time`.

    errors  the largest errors of the gradients of x and scale, with x and with x from y, against float64, relative to
            the largest gradient of a channel; normal data, |offset| to 1 and scale from 0.5 to 2, 4,096 elements a
            channel
    memory  megabytes for an image that a training step of a network keeps for its backward pass, counted in its
            graph; and the step's peak memory: what the resident memory of a fresh process rises by from a step with
            one image to two steps with all
    time    a step with it and a step without, in turns: how many times as long the first takes, the median of the
            rounds

The networks have leaky_relu for relu. All batch norms are in place that no addition follows: 33 of the 53 of
ResNet-50, and all 121 of DenseNet-121. Memory and time are those of TensorFlow's CPU device, in float32.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import ml_dtypes
import numpy as np

import tfops_kernels

# How the names of batch norms end of which an addition takes one in.
WITH_ADDITION = {"ResNet50": ("_0_bn", "_3_bn"), "DenseNet121": ()}
ACTIVATIONS = (None, "leaky_relu", "elu")
UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def _gradients(arrays: dict[str, np.ndarray], activation: str | None, in_place: bool) -> tuple[np.ndarray, np.ndarray]:
    x, vectors = arrays["x"], (arrays["scale"], arrays["offset"])
    forward = tfops_kernels.forward(x, *vectors, activation=activation, in_place=in_place)
    saved = forward.saved_mean, forward.saved_inv_std
    given = forward.y if in_place else x
    result = tfops_kernels.backward(
        arrays["dy"], given, *vectors, *saved, activation=activation, in_place=in_place, threads=2
    )
    return result.x, result.scale


def errors() -> None:
    """Prints the table of docs/numerics.md. float64 is compared with itself: x from y against x."""
    print("| type | activation | x: with x, from y | scale: with x, from y |\n|---|---|---|---|")
    for dtype in UNITS:
        kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        param = np.float64 if dtype == "float64" else np.float32
        rng = np.random.default_rng(0)
        arrays = {name: rng.standard_normal((4096, 256)).astype(kind) for name in ("x", "dy")}
        arrays |= {"scale": rng.uniform(0.5, 2, 256).astype(param), "offset": rng.uniform(-1, 1, 256).astype(param)}
        wide = {name: array.astype(np.float64) for name, array in arrays.items()}
        for activation in ACTIVATIONS:
            want = _gradients(wide, activation, in_place=False)
            cells = []
            for i in range(2):
                largest = np.abs(want[i]).max(0) if i == 0 else np.abs(want[i]).max()
                found = []
                for in_place in (False, True):
                    got = _gradients(arrays, activation, in_place)[i].astype(np.float64)
                    found.append(f"{(np.abs(got - want[i]) / largest).max():.0e}")
                cells.append(", ".join(found))
            print(f"| {dtype} | {activation or 'none'} | {' | '.join(cells)} |")


def build(name: str, in_place: bool) -> object:
    """The network with leaky_relu, converted, in place or not."""
    import keras

    import tfops.keras

    def copy(layer: keras.Layer) -> keras.Layer:
        if isinstance(layer, keras.layers.Activation):
            return keras.layers.Activation("leaky_relu", name=layer.name)
        return type(layer).from_config(layer.get_config())

    stock = getattr(keras.applications, name)(weights=None, classifier_activation=None)
    model = tfops.keras.convert(keras.models.clone_model(stock, clone_function=copy), verbose=0)
    for layer in model.layers:
        if isinstance(layer, tfops.keras.BatchNormalization):
            layer.in_place = in_place and not layer.name.endswith(WITH_ADDITION[name])
    return model


def step_of(model: object) -> object:
    """A step: forward pass, loss, gradients, update; with the images and labels that it is given."""
    import keras
    import tensorflow as tf

    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = model.trainable_variables

    @tf.function(input_signature=[tf.TensorSpec([None, 224, 224, 3]), tf.TensorSpec([None], tf.int32)])
    def step(x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(x, training=True))
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(1e-6 * gradient)
        return loss

    return step


def _inputs(batch: int) -> tuple[object, object]:
    import tensorflow as tf

    return tf.random.stateless_normal([batch, 224, 224, 3], [1, 2]), tf.zeros([batch], tf.int32)


def peak(name: str, in_place: bool, batch: int) -> None:
    """Prints the bytes that resident memory rises by from a step with an image to two with all: of a fresh process."""
    step, inputs = step_of(build(name, in_place)), _inputs(batch)
    float(step(*_inputs(1)))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    for _ in range(2):
        float(step(*inputs))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def memory(networks: list[str], batch: int) -> None:
    """Prints the table of docs/keras.md."""
    from kept import kept_bytes

    print("| network | kept: without, with | ratio | peak: without, with | ratio |\n|---|---|---|---|---|")
    for name in networks:
        kept = [kept_bytes(build(name, in_place), batch=4) / 4e6 for in_place in (False, True)]
        peaks = []
        for in_place in (False, True):
            command = [sys.executable, __file__, "peak", "--network", name, "--batch", str(batch)]
            run = subprocess.run(command + ["--in-place"] * in_place, capture_output=True, text=True, check=True)
            peaks.append(int(run.stdout.split()[-1]) / 1e6 / batch)
        print(
            f"| {name} | {kept[0]:.1f}, {kept[1]:.1f} | {kept[1] / kept[0]:.2f} "
            f"| {peaks[0]:.0f}, {peaks[1]:.0f} | {peaks[1] / peaks[0]:.2f} |",
            flush=True,
        )


def times(networks: list[str], batch: int, rounds: int) -> None:
    """Prints how many times as long a step takes in place."""
    for name in networks:
        steps, inputs = [step_of(build(name, in_place)) for in_place in (False, True)], _inputs(batch)
        for step in steps:
            float(step(*inputs))
        taken = np.zeros((rounds, 2))
        for i in range(rounds):
            for j in (0, 1) if i % 2 else (1, 0):
                start = time.perf_counter()
                float(steps[j](*inputs))
                taken[i, j] = time.perf_counter() - start
        ratios = np.percentile(taken[:, 1] / taken[:, 0], [25, 50, 75])
        milliseconds = np.median(taken, 0) * 1e3
        print(
            f"{name}, {batch} images: {milliseconds[0]:.0f} ms without, {milliseconds[1]:.0f} ms in place, "
            f"{ratios[1]:.3f} times as long (quartiles {ratios[0]:.3f} and {ratios[2]:.3f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "memory", "time", "peak"))
    parser.add_argument("--network", nargs="+", choices=WITH_ADDITION, default=list(WITH_ADDITION))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--in-place", action="store_true", help="of `peak`, which prints bytes for `memory`")
    arguments = parser.parse_args()
    if arguments.what == "errors":
        errors()
    elif arguments.what == "memory":
        sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests" / "helpers" / "tfops_testing"))
        memory(arguments.network, arguments.batch)
    elif arguments.what == "time":
        times(arguments.network, arguments.batch, arguments.rounds)
    else:
        peak(arguments.network[0], arguments.in_place, arguments.batch)


if __name__ == "__main__":
    main()
