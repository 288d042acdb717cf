"""keras.layers.BatchNormalization on the fused op."""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf

from tfops import _xla
from tfops._arguments import ACTIVATIONS, param_type
from tfops._batch_norm import fused_batch_norm
from tfops._phases import Statistics, batch_statistics, normalize, replicas
from tfops.keras._recomputing import is_recomputed
from tfops.keras._tags import Guarded, tag_applied, tag_pending


def check_backend(backend: str) -> None:
    if backend != "tensorflow":
        raise ImportError(
            f"tfops needs Keras' TensorFlow backend, but the backend is {backend!r}: set the environment variable "
            "KERAS_BACKEND=tensorflow before Keras is first imported"
        )


check_backend(keras.backend.backend())


@keras.saving.register_keras_serializable(package="tfops")
class BatchNormalization(Guarded, keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` with the fused kernels, and with activation and residual addition in them.

    Takes every argument of Keras' layer, with the same defaults, and holds the same weights under the same names. As
    there, the moving variance averages the population variance. Without an activation its config is that of Keras'
    layer. Three things differ in training: `synchronized` holds with a mask too, a batch of no elements leaves the
    moving statistics as they are, and they take a batch in once where `tf.recompute_grad` or `keras.RematScope` runs
    the layer twice (unless a `tf.function` in between runs what was traced before).

    Args:
      activation: None, "relu", "relu6", "leaky_relu" (slope 0.2) or "silu"; applied to the result.

    Call arguments:
      inputs, training, mask: as in Keras.
      residual: a tensor of the inputs' shape, added before the activation.
      inputs_mask: where Keras puts the inputs' own mask if there is a residual; `mask` goes before it.
      folded: what `convert` has folded into this call, of the layers that follow: an activation, which is applied, and
        the layer that follows passes it on; "add", or "add+" and an activation: then the inputs are passed on, and the
        addition that follows normalizes them.

    The attribute `folded` is that of all calls which do not tell; `convert` sets it in Sequential models, where calls
    have no arguments.
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, but it is {activation!r}")
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.folded: str | None = None
        self.supports_jit = _xla.supports_jit()

    # Keras tells the arguments of build and compute_output_shape by name: those of call, and "_shape".
    def build(self, inputs_shape: Any, residual_shape: Any = None) -> None:
        super().build(inputs_shape)

    def compute_output_shape(self, inputs_shape: Any, residual_shape: Any = None) -> Any:
        return super().compute_output_shape(inputs_shape)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)
        # Not in call, because a RematScope hands out other tensors than those which that returns.
        folded = kwargs.get("folded") or self.folded
        return y if folded is None or _has_addition(folded) else tag_applied(y, folded)

    def call(
        self,
        inputs: Any,
        training: bool | None = None,
        mask: Any = None,
        residual: Any = None,
        inputs_mask: Any = None,
        folded: str | None = None,
    ) -> Any:
        mask = inputs_mask if mask is None else mask
        folded = folded or self.folded
        if _has_addition(folded):
            later = folded.partition("+")[2] or None
            rest = functools.partial(self, inputs, training=training, mask=mask, folded=later)
            return tag_pending(tf.cast(inputs, self.compute_dtype), rest)
        training = bool(training) and self.trainable
        x = self._data(inputs)
        if mask is not None and len(mask.shape) != len(x.shape) - 1:
            raise ValueError(
                f"mask must have one dimension less than inputs, but its shape is {tuple(mask.shape)} and that of "
                f"inputs is {tuple(x.shape)}"
            )
        param = param_type(x.dtype)
        moving_mean, moving_variance = tf.cast(self.moving_mean, param), tf.cast(self.moving_variance, param)
        scale = tf.cast(self.gamma, param) if self.scale else tf.ones_like(moving_mean)
        offset = tf.cast(self.beta, param) if self.center else tf.zeros_like(moving_mean)
        settings = {
            "axis": self.axis,
            "epsilon": self.epsilon,
            "activation": folded or self.activation,
            "residual": None if residual is None else tf.cast(residual, x.dtype),
        }
        renorm = getattr(self, "renorm", False)  # not in older Keras, such as Python 3.10's newest
        if training and (mask is not None or renorm or (self.synchronized and replicas() > 1)):
            statistics = batch_statistics(
                x,
                self.axis,
                keep=None if mask is None else tf.broadcast_to(tf.cast(mask, tf.bool), tf.shape(x)[:-1]),
                ballast=0.0 if mask is None else keras.config.epsilon(),  # Keras' masked means have it
                synchronized=self.synchronized,
            )
            if renorm:
                r, d, *_ = self._renorm_correction_and_moments(statistics.mean, statistics.variance)
                scale, offset = self._compose_transforms(r, d, scale, offset, param)
            if not is_recomputed():
                self._update(statistics, renorm)
            y = normalize(x, scale, offset, statistics, **settings)
        else:
            y, mean, variance = fused_batch_norm(
                x,
                scale,
                offset,
                moving_mean,
                moving_variance,
                is_training=training,
                exponential_avg_factor=1.0 - self.momentum if training else 1.0,
                unbiased=False,
                **settings,
            )
            if training and not is_recomputed():
                self.moving_mean.assign(tf.cast(mean, self.moving_mean.dtype))
                self.moving_variance.assign(tf.cast(variance, self.moving_variance.dtype))
        return tf.cast(y, self.compute_dtype)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """`layer_call`, recomputed for the gradient where the layer's `keras.RematScope` has it so.

        `tf.recompute_grad`, which Keras uses, has gradients for what is given by position alone. In graphs it takes no
        keywords, and adds zeros to what it is given: that is the inputs and the residual here, and nothing else.
        """
        if _has_addition(kwargs.get("folded")):
            return layer_call  # which computes nothing; the addition calls the layer again
        recomputes = super().rematerialized_call(layer_call, *args, **kwargs) is not layer_call
        if not recomputes or self._remat_mode.mode == "activations":  # of which the kernels keep nothing in any case
            return layer_call

        def recomputed_call(
            inputs: Any, training: Any = None, mask: Any = None, residual: Any = None, **options: Any
        ) -> Any:
            def call(inputs: Any, residual: Any = None) -> Any:
                return layer_call(inputs, training=training, mask=mask, residual=residual, **options)

            tensors = [inputs] if residual is None else [inputs, residual]
            return tf.recompute_grad(call)(*tensors)

        return recomputed_call

    def _data(self, inputs: Any) -> tf.Tensor:
        """The inputs in a type that has kernels, as wide as theirs and as the compute type."""
        x = tf.convert_to_tensor(inputs)
        if not x.dtype.is_floating:
            return tf.cast(x, keras.backend.result_type("float32", self.compute_dtype))
        return tf.cast(x, keras.backend.result_type(x.dtype.name, self.compute_dtype))

    def _update(self, statistics: Statistics, renorm: bool) -> None:
        """The moving statistics: Keras' averages, but no elements leave them as they are."""
        mean, variance = statistics.mean, statistics.variance
        taken = statistics.count + statistics.ballast > 0

        def average(variable: Any, value: tf.Tensor, momentum: float) -> tf.Tensor:
            old = tf.cast(variable, value.dtype)
            new = tf.where(taken, old * momentum + value * (1.0 - momentum), old)
            variable.assign(tf.cast(new, variable.dtype))
            return new

        average(self.moving_mean, mean, self.momentum)
        if not renorm:
            average(self.moving_variance, variance, self.momentum)
            return
        stddev = tf.sqrt(variance + self.epsilon)
        average(self.renorm_mean, mean, self.renorm_momentum)
        average(self.renorm_stddev, stddev, self.renorm_momentum)
        moving_stddev = average(self.moving_stddev, stddev, self.momentum)
        moving_variance = tf.nn.relu(tf.square(moving_stddev) - self.epsilon)
        average(self.moving_variance, moving_variance, 0.0)

    def get_config(self) -> dict[str, Any]:
        # Without an activation, the config is one for Keras' layer too.
        own = {"activation": self.activation, "folded": self.folded}
        return {**super().get_config(), **{name: value for name, value in own.items() if value is not None}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BatchNormalization:
        config = dict(config)
        folded = config.pop("folded", None)
        layer = super().from_config(config)
        layer.folded = folded
        return layer


def _has_addition(folded: str | None) -> bool:
    return folded is not None and folded.startswith("add")
