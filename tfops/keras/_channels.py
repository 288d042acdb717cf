"""What can be wrong with the channels of batch norms: found in the layers' variables, and on a batch."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from tfops.keras._folding import sublayers

Array = npt.NDArray[np.float64]

KINDS = {"nonfinite": "values that are not finite", "dead": "values near zero", "drift": "drift from the batch"}

# Those that the data reach first come first: a channel that is bad makes all gradients bad.
_VARIABLES = ("moving_mean", "moving_variance", "gamma", "beta")


class Moments(NamedTuple):
    """Of each channel."""

    mean: Array
    variance: Array


class Thresholds(NamedTuple):
    """What is near zero, and what is far apart."""

    scale: float
    variance: float
    drift: float


class Channels(NamedTuple):
    """The state of a layer's channels.

    Attributes:
      values: arrays of shape [C], by name.
      found: by kind and variable, which channels are of this kind, and a value of each channel.
    """

    values: dict[str, Array]
    found: dict[tuple[str, str], tuple[npt.NDArray[np.bool_], Array]]

    def scalars(self) -> dict[str, float]:
        """The number of channels of each kind, and the largest drifts."""
        masks = defaultdict(list)
        for (kind, _), (mask, _) in self.found.items():
            masks[kind].append(mask)
        counts = {f"{kind}_channels": int(np.any(each, axis=0).sum()) for kind, each in masks.items()}
        drifts = {name: value for name, value in self.values.items() if name.endswith("drift")}
        return {**counts, **{f"largest_{name}": float(np.abs(value).max()) for name, value in drifts.items()}}


def batch_norms(model: keras.Model) -> dict[str, keras.Layer]:
    """The batch norms in a model by their paths, such as "encoder/block/norm"; a layer that is shared, once."""
    found: dict[str, keras.Layer] = {}
    seen = set()

    def walk(layer: keras.Layer, path: str) -> None:
        for inside in sublayers(layer):
            if id(inside) in seen:
                continue
            seen.add(id(inside))
            name = f"{path}{inside.name}"
            if isinstance(inside, keras.layers.BatchNormalization):
                # Layers that are attributes may have one name.
                names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
                found[next(each for each in names if each not in found)] = inside
            walk(inside, f"{name}/")

    walk(model, "")
    return found


def variables(layer: keras.Layer, strategy: tf.distribute.Strategy) -> dict[str, tuple[tf.Variable, ...]]:
    """A batch norm's statistics and parameters by name, as far as it has them; none before it is built.

    Of each variable, what the replicas of this process hold: moving statistics that are not synchronized differ.
    """
    held = {name: getattr(layer, name, None) for name in _VARIABLES}
    return {
        name: strategy.experimental_local_results(variable.value)
        for name, variable in held.items()
        if variable is not None
    }


def finiteness(layers: Iterable[keras.Layer], strategy: tf.distribute.Strategy) -> Callable[[], tf.Tensor]:
    """A function that tells, in one call of TensorFlow, whether all variables of batch norms are finite."""
    held = [replica for layer in layers for replicas in variables(layer, strategy).values() for replica in replicas]

    def check() -> tf.Tensor:
        values = [tf.zeros([0], tf.float64), *(tf.cast(replica, tf.float64) for replica in held)]
        return tf.reduce_all(tf.math.is_finite(tf.concat(values, axis=0)))

    compiled: Callable[[], tf.Tensor] = tf.function(check)
    return compiled


def inspect(
    layer: keras.Layer, strategy: tf.distribute.Strategy, batch: Moments | None, thresholds: Thresholds
) -> Channels:
    """The state of a batch norm's channels: on the first replica, but values that are not finite are those of all.

    Args:
      batch: the moments of what the layer is given, if they are to be compared with the moving ones.
    """
    replicas = {name: np.stack([_array(each) for each in held]) for name, held in variables(layer, strategy).items()}
    held = {name: values[0] for name, values in replicas.items()}
    mean, variance, epsilon = held["moving_mean"], held["moving_variance"], layer.epsilon
    found: dict[tuple[str, str], tuple[npt.NDArray[np.bool_], Array]] = {}
    for name, values in replicas.items():
        bad = ~np.isfinite(values)
        found["nonfinite", name] = np.any(bad, axis=0), values[bad.argmax(axis=0), np.arange(len(mean))]
    found["dead", "moving_variance"] = variance <= thresholds.variance * epsilon, variance
    state = {"moving_variance": variance}
    if "gamma" in held:
        state["gamma"] = held["gamma"]
        size = np.abs(held["gamma"])
        largest = size[np.isfinite(size)].max(initial=0.0)
        found["dead", "gamma"] = size <= thresholds.scale * largest, held["gamma"]
    if batch is not None:
        known = np.any([mask for (kind, _), (mask, _) in found.items() if kind == "nonfinite"], axis=0)
        for name, value in batch._asdict().items():
            found["nonfinite", f"batch_{name}"] = ~np.isfinite(value) & ~known, value
        with np.errstate(all="ignore"):  # there may be NaN, and 0 / 0
            state["mean_drift"] = (batch.mean - mean) / np.sqrt(variance + epsilon)
            state["variance_drift"] = np.log((batch.variance + epsilon) / (variance + epsilon))
        for name in ("mean", "variance"):
            drift = state[f"{name}_drift"]
            found["drift", f"moving_{name}"] = np.abs(drift) > thresholds.drift, drift
    return Channels(state, found)


def batch_moments(model: keras.Model, norms: Mapping[str, keras.Layer], data: Any) -> dict[str, Moments]:
    """The moments of what batch norms are given in inference, on a batch of the model's inputs.

    Of a layer that is called several times, they are the means over its calls, since the moving statistics take in one
    call after the other. The model's state stays as it is.

    Args:
      norms: batch norms of the model, by the names that they have in the result.
    """
    calls: dict[str, list[Moments]] = defaultdict(list)

    def recorded(path: str, layer: keras.Layer) -> Callable[..., Any]:
        call = layer.call

        @functools.wraps(call)
        def record(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("mask", kwargs.get("inputs_mask"))
            # A graph that a layer makes of its own holds no values.
            if tf.executing_eagerly() and (mask is None or tf.reduce_any(mask)):
                calls[path].append(_moments(inputs, layer.axis, mask))
            return call(inputs, *args, **kwargs)

        return record

    with contextlib.ExitStack() as stack:
        stack.enter_context(_functions_run_eagerly())
        stack.enter_context(keras.StatelessScope())
        for path, layer in norms.items():
            stack.enter_context(_calling(layer, recorded(path, layer)))
        model(data, training=False)
    return {path: Moments(*np.mean(moments, axis=0)) for path, moments in calls.items()}


def _array(variable: Any) -> Array:
    array: Array = tf.cast(variable, tf.float64).numpy()
    return array


def _moments(x: Any, axis: int, mask: Any) -> Moments:
    x = tf.cast(x, tf.float64)
    axes = [i for i in range(x.shape.rank) if i != axis % x.shape.rank]
    if mask is None:
        mean, variance = tf.nn.moments(x, axes)
    else:
        weights = tf.cast(tf.expand_dims(mask, -1), tf.float64)
        mean, variance = tf.nn.weighted_moments(x, axes, weights)
    return Moments(mean.numpy(), variance.numpy())


@contextlib.contextmanager
def _functions_run_eagerly() -> Iterator[None]:
    """Has what is decorated by `tf.function` run line by line, instead of a graph that was made before."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextlib.contextmanager
def _calling(layer: keras.Layer, call: Callable[..., Any]) -> Iterator[None]:
    """Has a layer run another `call`."""
    own = vars(layer)  # Keras would track what is set otherwise
    before = {name: own[name] for name in ("call",) if name in own}
    own["call"] = call
    try:
        yield
    finally:
        del own["call"]
        own.update(before)
