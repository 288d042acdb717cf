"""keras.layers.BatchNormalization on the fused op."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfops import _xla
from tfops._arguments import ACTIVATIONS, param_type
from tfops._batch_norm import fused_batch_norm


def check_backend(backend: str) -> None:
    if backend != "tensorflow":
        raise ImportError(
            f"tfops needs Keras' TensorFlow backend, but the backend is {backend!r}: set the environment variable "
            "KERAS_BACKEND=tensorflow before Keras is first imported"
        )


check_backend(keras.backend.backend())


@keras.saving.register_keras_serializable(package="tfops")
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` with the fused kernels, and with activation and residual addition in them.

    Takes every argument of Keras' layer, with the same defaults, and holds the same weights. As there, the moving
    variance averages the population variance. Masks, `renorm` and `synchronized` in training take Keras' own way, and
    the activation after it.

    Args:
      activation: None, "relu", "relu6", "leaky_relu" (slope 0.2) or "silu"; applied to the result.

    Call arguments:
      inputs, training, mask: as in Keras.
      residual: a tensor of the inputs' shape, added before the activation.
    """

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, but it is {activation!r}")
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.supports_jit = _xla.supports_jit()

    # Keras tells the arguments of build and compute_output_shape by name: those of call, and "_shape".
    def build(self, inputs_shape: Any, residual_shape: Any = None) -> None:
        super().build(inputs_shape)

    def compute_output_shape(self, inputs_shape: Any, residual_shape: Any = None) -> Any:
        return super().compute_output_shape(inputs_shape)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, residual: Any = None) -> Any:
        training = bool(training) and self.trainable
        renorm = getattr(self, "renorm", False)  # not in older Keras, such as Python 3.10's newest
        if training and (mask is not None or renorm or self.synchronized):
            return self._finish(super().call(inputs, training=training, mask=mask), residual)
        x = tf.cast(inputs, self.compute_dtype)
        param = param_type(x.dtype)
        moving_mean, moving_variance = tf.cast(self.moving_mean, param), tf.cast(self.moving_variance, param)
        y, mean, variance = fused_batch_norm(
            x,
            tf.cast(self.gamma, param) if self.scale else tf.ones_like(moving_mean),
            tf.cast(self.beta, param) if self.center else tf.zeros_like(moving_mean),
            moving_mean,
            moving_variance,
            epsilon=self.epsilon,
            is_training=training,
            exponential_avg_factor=1.0 - self.momentum if training else 1.0,
            axis=self.axis,
            activation=self.activation,
            residual=None if residual is None else tf.cast(residual, x.dtype),
            unbiased=False,
        )
        if training:
            self.moving_mean.assign(tf.cast(mean, self.moving_mean.dtype))
            self.moving_variance.assign(tf.cast(variance, self.moving_variance.dtype))
        return y

    def _finish(self, z: Any, residual: Any) -> Any:
        if residual is not None:
            z += tf.cast(residual, z.dtype)
        return z if self.activation is None else keras.activations.get(self.activation)(z)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "activation": self.activation}
