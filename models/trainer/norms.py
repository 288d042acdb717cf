"""Batch normalization followed by ReLU, four ways, for both ways of writing a network.

    tfops    tfops' fused op: normalization and ReLU in one kernel
    keras    what Keras' layer computes: moments and normalization, op by op, and then ReLU
    tf       TensorFlow's own fused op, and then ReLU
    none     no batch norm: a bias, and ReLU

All have Keras' conventions: `y = (x - mean) / sqrt(variance + EPSILON) * gamma + beta`, and moving averages of the mean
and the population variance, `moving = MOMENTUM * moving + (1 - MOMENTUM) * batch`. So whatever is trained with one can
be tested with another.
"""

from __future__ import annotations

import keras
import tensorflow as tf

import tfops.keras

NORMS = ("tfops", "keras", "tf", "none")
EPSILON = 1e-3

# Moving statistics begin at 0 and 1, and tests say nothing until they have forgotten that: it takes hundreds of steps
# with Keras' default of 0.99, some thirty with 0.8.
MOMENTUM = 0.8


# In Keras: layers. ----------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="models")
class TensorFlowBatchNormalization(keras.layers.BatchNormalization):
    """Keras' layer over the last dimension of 2-D or 4-D input, computed by TensorFlow's fused op."""

    def call(self, inputs, training=None, mask=None):
        x = inputs if inputs.shape.rank == 4 else inputs[:, tf.newaxis, tf.newaxis, :]
        if not (training and self.trainable):
            y, _, _ = tf.compat.v1.nn.fused_batch_norm(
                x,
                tf.convert_to_tensor(self.gamma, tf.float32),
                tf.convert_to_tensor(self.beta, tf.float32),
                tf.convert_to_tensor(self.moving_mean, tf.float32),
                tf.convert_to_tensor(self.moving_variance, tf.float32),
                epsilon=self.epsilon,
                is_training=False,
            )
        else:
            y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
                x,
                tf.convert_to_tensor(self.gamma, tf.float32),
                tf.convert_to_tensor(self.beta, tf.float32),
                epsilon=self.epsilon,
            )
            self.moving_mean.assign(_average(self.moving_mean, mean))
            self.moving_variance.assign(_average(self.moving_variance, _population(variance, x)))
        return tf.reshape(y, tf.shape(inputs))


def norm_relu(norm: str, synchronized: bool = False) -> list[keras.Layer]:
    """Layers that normalize and apply ReLU.

    Args:
        norm: One of `NORMS`. With "none", the layer before it needs a bias.
        synchronized: Take statistics over all replicas of a `tf.distribute.Strategy`; "tfops" and "keras" only.

    Returns:
        One layer, or two.
    """
    if norm == "none":
        return [keras.layers.ReLU()]
    if norm == "tf":
        if synchronized:
            raise ValueError("norm 'tf' cannot be synchronized: TensorFlow's fused op sees one replica")
        return [TensorFlowBatchNormalization(momentum=MOMENTUM, epsilon=EPSILON), keras.layers.ReLU()]
    arguments = {"momentum": MOMENTUM, "epsilon": EPSILON, "synchronized": synchronized}
    if norm == "tfops":
        return [tfops.keras.BatchNormalization(**arguments, activation="relu")]
    return [keras.layers.BatchNormalization(**arguments), keras.layers.ReLU()]


# In a graph: ops, variables by name, and assign ops that update the moving averages. ----------------------------------


def graph_norm_relu(x: tf.Tensor, training: tf.Tensor, norm: str, name: str) -> tf.Tensor:
    """Normalizes and applies ReLU, in the default graph.

    The ops that update the moving averages are added to the collection `UPDATE_OPS`: a training op runs them.

    Args:
        x: `[batch, channels]` or `[batch, height, width, channels]`, of any floating-point type.
        training: A scalar bool: normalize with the batch's statistics, or with the moving ones.
        norm: One of `NORMS`.
        name: Of the variables' scope.

    Returns:
        A tensor of x's shape and dtype.
    """
    channels = x.shape[-1]
    with tf.compat.v1.variable_scope(name):
        beta = tf.compat.v1.get_variable("beta", [channels], initializer=tf.zeros_initializer())
        if norm == "none":
            return tf.nn.relu(x + tf.cast(beta, x.dtype))
        gamma = tf.compat.v1.get_variable("gamma", [channels], initializer=tf.ones_initializer())
        moving_mean = tf.compat.v1.get_variable(
            "moving_mean", [channels], initializer=tf.zeros_initializer(), trainable=False
        )
        moving_variance = tf.compat.v1.get_variable(
            "moving_variance", [channels], initializer=tf.ones_initializer(), trainable=False
        )

    if norm == "tfops":
        # In training the op returns the moving averages as they shall be; in inference, as they are.
        y, mean, variance = tfops.fused_batch_norm(
            x,
            gamma,
            beta,
            moving_mean,
            moving_variance,
            epsilon=EPSILON,
            is_training=training,
            exponential_avg_factor=1 - MOMENTUM,
            activation="relu",
            unbiased=False,
        )
    else:
        forward = _tensorflow_norm if norm == "tf" else _plain_norm
        y, mean, variance = tf.cond(
            training,
            lambda: forward(x, gamma, beta, moving_mean, moving_variance, True),
            lambda: forward(x, gamma, beta, moving_mean, moving_variance, False),
        )
        y = tf.nn.relu(tf.ensure_shape(y, x.shape))
    updates = [tf.compat.v1.assign(moving_mean, mean), tf.compat.v1.assign(moving_variance, variance)]
    for update in updates:
        tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.UPDATE_OPS, update)
    return y


def _plain_norm(x, gamma, beta, moving_mean, moving_variance, training):
    wide = tf.cast(x, tf.float32)
    mean, variance = tf.nn.moments(wide, list(range(x.shape.rank - 1))) if training else (moving_mean, moving_variance)
    y = tf.cast(tf.nn.batch_normalization(wide, mean, variance, beta, gamma, EPSILON), x.dtype)
    if not training:
        return y, tf.identity(moving_mean), tf.identity(moving_variance)
    return y, _average(moving_mean, mean), _average(moving_variance, variance)


def _tensorflow_norm(x, gamma, beta, moving_mean, moving_variance, training):
    x4 = x if x.shape.rank == 4 else x[:, tf.newaxis, tf.newaxis, :]
    if not training:
        y, _, _ = tf.compat.v1.nn.fused_batch_norm(
            x4, gamma, beta, moving_mean, moving_variance, epsilon=EPSILON, is_training=False
        )
        return tf.reshape(y, tf.shape(x)), tf.identity(moving_mean), tf.identity(moving_variance)
    y, mean, variance = tf.compat.v1.nn.fused_batch_norm(x4, gamma, beta, epsilon=EPSILON)
    variance = _population(variance, x4)
    return tf.reshape(y, tf.shape(x)), _average(moving_mean, mean), _average(moving_variance, variance)


def _average(moving, batch):
    return MOMENTUM * tf.convert_to_tensor(moving, tf.float32) + (1 - MOMENTUM) * batch


def _population(unbiased: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """TensorFlow's op returns the unbiased variance, with n - 1 where the population's has n."""
    n = tf.cast(tf.reduce_prod(tf.shape(x)[:-1]), tf.float32)
    return unbiased * (n - 1) / n
