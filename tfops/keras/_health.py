"""A callback that watches a model's batch norms while it trains."""

from __future__ import annotations

import importlib.util
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfops.keras._channels import (
    KINDS,
    Channels,
    Thresholds,
    batch_moments,
    batch_norms,
    finiteness,
    inspect,
    variables,
)

Action = Literal["log", "warn", "stop"]
ACTIONS = ("log", "warn", "stop")


class BatchNormFinding(NamedTuple):
    """Channels of a batch norm in which `BatchNormHealth` has found something.

    Attributes:
        epoch: The epoch in which it was found, from 0 as Keras counts.
        batch: The batch of the epoch after which it was found, from 0, or None at the end of the epoch.
        layer: The path of the layer: the names of the models and layers it is in, and its own, such as "encoder/norm".
        kind: "nonfinite", "dead" or "drift".
        variable: What has it: "moving_mean", "moving_variance", "gamma" or "beta", or for a batch given as `data`
            "batch_mean" or "batch_variance".
        channels: The indices of the channels.
        values: The variable's values in these channels, or their drifts.
    """

    epoch: int
    batch: int | None
    layer: str
    kind: str
    variable: str
    channels: tuple[int, ...]
    values: tuple[float, ...]


class BatchNormHealth(keras.callbacks.Callback):
    """A Keras callback that finds channels of batch norms which are dead, not finite, or have drifted.

    It watches every `keras.layers.BatchNormalization` and `tfops.keras.BatchNormalization` of the model, and every
    layer derived from them, in models and layers inside it too. What it finds is of three kinds:

    - "nonfinite": a NaN or an infinity in gamma, beta, moving_mean or moving_variance. One bad batch puts it into the
      moving statistics, which keep it.
    - "dead": the channel's scale is near zero, or its data are constant but for little.
    - "drift": the moving statistics, which inference takes, are far from those of `data`, a batch of the model's
      inputs. With mean and variance of what the layer is given in inference on that batch, both drifts are 0 where the
      two agree. (Where the layer is called several times, mean and variance are the means over its calls.)

    Computed in float64, for each channel:

        dead:   |gamma| <= scale_threshold * (the largest |gamma| of the layer)
                moving_variance <= variance_threshold * epsilon
        drift:  |mean_drift| > drift_threshold, mean_drift = (mean - moving_mean) / sqrt(moving_variance + epsilon)
                |variance_drift| > drift_threshold,
                variance_drift = log((variance + epsilon) / (moving_variance + epsilon))

    It looks at the end of each epoch. The epoch's logs get the numbers of such channels in all layers, as
    `batch_norm_nonfinite_channels` and `batch_norm_dead_channels`; with `data` also `batch_norm_drift_channels`, and
    the largest magnitudes as `batch_norm_largest_mean_drift` and `batch_norm_largest_variance_drift`. `History` has
    them, and so have callbacks that come after this one in the list.

    The model's state is not changed. Under a `tf.distribute` strategy, moving statistics that are not synchronized
    differ. Values that are not finite are found on any replica of the process; the rest is that of the first, which is
    the one that is saved.

    Args:
        action: What to do when something is found: "log" only, "warn", or "stop" the training with a warning. A dict
            gives each kind its own; a kind that is not in it has "warn". There is one warning for each layer and kind.
        data: A batch of the model's inputs, as in `model(data)`, or None for no drift. Inference runs on it at every
            look, eagerly.
        every: A number of batches after which to look, too, or None. With `steps_per_execution`, it counts executions.
        each_batch: Whether to check after each batch that the variables are finite, until one is not, so that the batch
            which did it is known.
        log_dir: A folder for TensorBoard, or None. There go, by layer, the numbers of channels and the largest drifts
            as scalars, and gamma, moving_variance and the drifts as histograms. Their step is the epoch, or with
            `every` the number of batches.
        scale_threshold: See above. So are the next.
        variance_threshold: In units of epsilon.
        drift_threshold: In standard deviations for the mean, and in natural logarithms for the variance.

    Attributes:
        findings: What the latest `fit` found: a list of `BatchNormFinding`. A channel is in it once for each kind and
            variable, when it is first found.

    Raises:
        ValueError: An argument is none of the above.
        ImportError: `log_dir` is given, and the package tensorboard is not installed.

    Examples:
        >>> import keras
        >>> import numpy as np
        >>> import tfops
        >>> norm = tfops.keras.BatchNormalization(name="norm")
        >>> model = keras.Sequential([keras.Input([3]), norm, keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x = np.random.rand(16, 3)
        >>> x[9, 1] = np.nan
        >>> health = tfops.keras.BatchNormHealth({"nonfinite": "log"}, each_batch=True)
        >>> history = model.fit(x, np.zeros([16, 1]), 4, shuffle=False, verbose=0, callbacks=[health])
        >>> print(health.report())
        epoch  batch  layer  kind       variable         channels  values
            0      2  norm   nonfinite  moving_mean      1         nan
            0      2  norm   nonfinite  moving_variance  1         nan
            0      2  norm   nonfinite  gamma            0, 1, 2   nan
            0      2  norm   nonfinite  beta             0, 1, 2   nan
        >>> history.history["batch_norm_nonfinite_channels"]
        [3]
    """

    def __init__(
        self,
        action: Action | Mapping[str, Action] = "warn",
        *,
        data: Any = None,
        every: int | None = None,
        each_batch: bool = False,
        log_dir: str | PathLike[str] | None = None,
        scale_threshold: float = 1e-3,
        variance_threshold: float = 1e-3,
        drift_threshold: float = 1.0,
    ):
        super().__init__()
        given = action if isinstance(action, Mapping) else dict.fromkeys(KINDS, action)
        if not (given.keys() <= KINDS.keys() and all(each in ACTIONS for each in given.values())):
            raise ValueError(
                f"action must be one of {', '.join(map(repr, ACTIONS))}, or a dict of these with keys among "
                f"{', '.join(map(repr, KINDS))}, but it is {action!r}"
            )
        if every is not None and not (isinstance(every, numbers.Integral) and every >= 1):
            raise ValueError(f"every must be an integer >= 1 or None, but it is {every!r}")
        self._thresholds = Thresholds(scale_threshold, variance_threshold, drift_threshold)
        for name, value in self._thresholds._asdict().items():
            if not (isinstance(value, numbers.Real) and 0 <= float(value) < math.inf):
                raise ValueError(f"{name}_threshold must be a finite number >= 0, but it is {value!r}")
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError("log_dir needs the package tensorboard, which is not installed: pip install tensorboard")
        self._actions = {**dict.fromkeys(KINDS, "warn"), **given}
        self._data = data
        self._every = every
        self._each_batch = each_batch
        self._log_dir = log_dir
        # Whether Keras may go on with the next batch before it calls on_train_batch_end, from another thread.
        self.async_safe = every is None and not each_batch
        self._batches = 0  # in all calls of `fit`
        self._begin()

    def _begin(self) -> None:
        self.findings: list[BatchNormFinding] = []
        self._norms: dict[str, keras.Layer] = {}
        self._epoch = 0
        self._known: dict[tuple[str, str, str], frozenset[int]] = {}  # channels, by layer, kind and variable
        self._told: set[tuple[str, str]] = set()  # layers and kinds
        self._totals: dict[str, float] = {}
        self._are_finite: Callable[[], tf.Tensor] | None = None
        self._writer: Any = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the model's batch norms."""
        self._begin()
        self._norms = batch_norms(self.model)
        if not self._norms:
            warnings.warn(f"BatchNormHealth has nothing to watch: {self.model.name} has no batch norm", stacklevel=2)
        if self._log_dir is not None:
            self._writer = tf.summary.create_file_writer(str(self._log_dir))

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks, if `every` says so, or if `each_batch` does and a variable is not finite."""
        if self.async_safe:
            return
        self._batches += 1
        if self._every is not None and self._batches % self._every == 0:
            self._look(batch, self._batches)
        elif self._each_batch and not any(kind == "nonfinite" for _, kind, _ in self._known):
            self._are_finite = self._are_finite or finiteness(self._norms.values(), self.model.distribute_strategy)
            if not self._are_finite():
                self._look(batch, None)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks, and adds the numbers of channels to the logs."""
        if self._every is None:
            self._look(None, epoch)
        elif self._batches % self._every:  # else it has just looked
            self._look(None, self._batches)
        if logs is not None:
            logs.update({f"batch_norm_{name}": value for name, value in self._totals.items()})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Closes the file for TensorBoard."""
        if self._writer is not None:
            self._writer.close()

    def report(self) -> str:
        """The findings as a table, with a line for each."""
        if not self.findings:
            return "nothing found"
        rows: list[tuple[str, ...]] = [BatchNormFinding._fields]
        for finding in self.findings:
            epoch, batch, *names, channels, values = finding
            numbered = str(epoch), "" if batch is None else str(batch)
            rows.append((*numbered, *names, _list(channels), _list(dict.fromkeys(f"{value:.3g}" for value in values))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = [[f"{cell:{'>' if i < 2 else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
        return "\n".join("  ".join(cells).rstrip() for cells in aligned)

    def _look(self, batch: int | None, step: int | None) -> None:
        """Inspects all channels; what it sees is written if there is a step."""
        strategy = self.model.distribute_strategy
        built = {path: layer for path, layer in self._norms.items() if variables(layer, strategy)}
        moments = {} if self._data is None or not built else batch_moments(self.model, built, self._data)
        layers = {path: inspect(layer, strategy, moments.get(path), self._thresholds) for path, layer in built.items()}
        self._totals = {"nonfinite_channels": 0, "dead_channels": 0}
        for channels in layers.values():
            for name, value in channels.scalars().items():
                total = self._totals.get(name, 0)
                # A drift that is NaN stays so.
                self._totals[name] = float(np.maximum(total, value)) if name.startswith("largest") else total + value
        if self._writer is not None and step is not None:
            self._write(layers, step)
        new = [each for path, channels in layers.items() for each in self._find(batch, path, channels)]
        self.findings += new
        for kind in KINDS:
            self._tell(kind, [each for each in new if each.kind == kind])

    def _find(self, batch: int | None, path: str, channels: Channels) -> list[BatchNormFinding]:
        """What has not been found in the layer before."""
        new = []
        for (kind, variable), (mask, values) in channels.found.items():
            known = self._known.get((path, kind, variable), frozenset())
            fresh = tuple(i for i in np.flatnonzero(mask).tolist() if i not in known)
            if fresh:
                self._known[path, kind, variable] = known | set(fresh)
                found = tuple(values[list(fresh)].tolist())
                new.append(BatchNormFinding(self._epoch, batch, path, kind, variable, fresh, found))
        return new

    def _tell(self, kind: str, findings: Sequence[BatchNormFinding]) -> None:
        """Warns of layers in which nothing of the kind has been found before, and stops."""
        findings = [each for each in findings if (each.layer, kind) not in self._told]
        if not findings or self._actions[kind] == "log":
            return
        self._told.update((each.layer, kind) for each in findings)
        stops = self._actions[kind] == "stop"
        if stops:
            self.model.stop_training = True
        where = [f"{each.layer}.{each.variable}, {_named(each.channels)}" for each in findings]
        when = f"epoch {self._epoch}" + ("" if findings[0].batch is None else f", batch {findings[0].batch}")
        warnings.warn(
            f"{'training stops' if stops else 'a batch norm needs a look'} ({when}): {KINDS[kind]} in "
            + _list(where, 5, "; "),
            stacklevel=4,
        )

    def _write(self, layers: Mapping[str, Channels], step: int) -> None:
        with self._writer.as_default(step):
            for name, value in self._totals.items():
                tf.summary.scalar(f"batch_norm/{name}", value)
            for path, channels in layers.items():
                for name, value in channels.scalars().items():
                    tf.summary.scalar(f"batch_norm/{path}/{name}", value)
                for name, values in channels.values.items():
                    tf.summary.histogram(f"batch_norm/{path}/{name}", values[np.isfinite(values)])
        self._writer.flush()


def _named(channels: Sequence[int]) -> str:
    return f"channel{'s' if len(channels) > 1 else ''} {_list(channels)}"


def _list(items: Iterable[object], most: int = 8, separator: str = ", ") -> str:
    texts = list(map(str, items))
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
