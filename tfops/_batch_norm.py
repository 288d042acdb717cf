"""The op as a function."""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

from tfops import _fallback, _gpus, _gradients, _vectorization  # noqa: F401  (register gradients and converters)
from tfops._arguments import convert, float_attribute
from tfops._library import ops


def fused_batch_norm(
    x: Any,
    scale: Any,
    offset: Any,
    mean: Any = None,
    variance: Any = None,
    epsilon: float | None = 0.001,
    data_format: str | None = "NHWC",
    is_training: bool | tf.Tensor | None = True,
    name: str | None = None,
    exponential_avg_factor: float | None = 1.0,
    *,
    axis: int | None = None,
    activation: str | None = None,
    residual: Any = None,
    unbiased: bool = True,
    virtual_batch_size: int | None = None,
    in_place: bool = False,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Batch normalization, residual addition and activation in one op.

    In training, with m and v the mean and the population variance of x over all dimensions but the channels':

        y = activation((x - m) / sqrt(v + epsilon) * scale + offset + residual)

    In inference, m and v are the arguments `mean` and `variance`. Signature and meaning are those of
    `tf.compat.v1.nn.fused_batch_norm`, and the formula is that of
    [Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167). What comes after the star is new, and so are float64,
    any rank of at least 2, and derivatives of the returned mean and variance. All arithmetic is in the dtype of
    `scale`. `tfops.reference.fused_batch_norm` is the same, written in TensorFlow's own operations.

    Args:
        x: The data: float16, bfloat16, float32 or float64, of rank >= 2.
        scale: The factors, of shape [C] with C the size of x's channel dimension; float64 if x is, else float32.
        offset: The summands, of the shape and dtype of `scale`.
        mean: In inference the mean to normalize with. In training with `exponential_avg_factor` other than 1 the
            running mean; otherwise it is not needed, and may be None or empty. Of the shape and dtype of `scale`, but a
            NumPy array may have any number type.
        variance: In inference the variance to normalize with, in training the running one; likewise.
        epsilon: A number >= 0, added to the variance. It is rounded to float32, as in TensorFlow's op, unless x is
            float64. With 0, a channel without variance comes out NaN. None means 0.0001, as in TensorFlow's op.
        data_format: "NHWC" (or None), "NDHWC" or "NWC" if channels are the last dimension; "NCHW", "NCDHW" or "NCW" if
            they are the second.
        is_training: A Python bool, or a scalar bool tensor, which may be a placeholder. None means True.
        name: The name of the op.
        exponential_avg_factor: The share f of the batch in the returned statistics, in [0, 1]. None means 1. It is
            rounded as `epsilon` is.
        axis: The dimension of the channels, in [-rank, rank). It replaces `data_format`.
        activation: None, or one of "relu", "relu6", "leaky_relu" (with slope 0.2), "silu", "hard_silu", "gelu",
            "gelu_tanh", "elu", "selu", "tanh", "sigmoid", "softplus" and "mish".
            "gelu" is z Phi(z), and "gelu_tanh" its approximation by tanh. Parameters may follow as in a call:
            "leaky_relu(negative_slope=0.1)", "elu(alpha=0.5)", or "relu(max_value=20, negative_slope=0.1,
            threshold=1)", of which any may be left out, and which means what Keras' ReLU layer does.
        residual: A tensor of the shape and dtype of x, added before the activation.
        unbiased: Whether the returned variance is the unbiased estimate, which divides by n - 1 where v divides by n,
            the number of elements in a channel. (For n = 1, both divide by 1.)
        virtual_batch_size: In training, of how many consecutive entries of dimension 0 a virtual batch consists. Each
            is normalized with its own m and v (ghost batch normalization,
            [Hoffer, Hubara and Soudry, 2017](https://arxiv.org/abs/1705.08741)), and n is the number of its elements;
            in the returned statistics, m and v are the averages of them all. The size of dimension 0, which may not
            have the channels, is a multiple of it. None means that there is one batch.
        in_place: Whether training keeps y alone for the gradient, which computes x from it again, as in
            [Rota Bulo et al., 2018](https://arxiv.org/abs/1712.02616). In a `tf.function`, y then takes the memory of
            x where nothing else reads that; an eager tape keeps x in any case. It goes with the activations None,
            "leaky_relu" and "elu", and without a residual. x comes back with rounding errors
            ([bounds](https://tfops.github.io/tfops/numerics/#x-from-y)), and not at all where scale is too near 0:
            |scale| must be more than 4 u (|offset| + d), with u the half of an ulp of 1, and d the least normal number,
            in the dtype of x. In inference, and in the place of the kernels on a GPU that these cannot serve, it is
            without effect.

    Returns:
        y: The result, of the shape and dtype of x.
        mean: Of shape [C]. In training (1 - f) * mean + f * m; in inference `mean`.
        variance: Of shape [C]. In training (1 - f) * variance + f * v, with v unbiased if `unbiased`; in inference
            `variance`. An empty batch leaves both statistics as they were given, and returns zeros if they were not. In
            training, a channel with infinities of one sign and no NaN has that infinity for its m, and NaN for v and y.

    Raises:
        TypeError: An argument has a wrong type or dtype. The message names the argument and its value.
        ValueError: An argument has a wrong value, or shapes do not match while a graph is built. Likewise.
        tf.errors.InvalidArgumentError: Shapes or values do not match when the op runs, as in every eager call. Or, with
            `in_place`, scale is too near 0 in some channel. On a GPU the gradients of x and scale are NaN in that
            channel instead: to raise an error there would be to wait for the GPU.

    Examples:
        Training: the mean and the (unbiased) variance of the batch come back with the result.

        >>> import tensorflow as tf
        >>> import tfops
        >>> x = tf.constant([[1.0, 10.0], [3.0, 30.0]])
        >>> y, mean, variance = tfops.fused_batch_norm(x, scale=[1.0, 1.0], offset=[0.0, 0.0])
        >>> print(y.numpy().round(2))
        [[-1. -1.]
         [ 1.  1.]]
        >>> print(mean.numpy(), variance.numpy())
        [ 2. 20.] [  2. 200.]

        Inference with given statistics, a residual and an activation:

        >>> y, _, _ = tfops.fused_batch_norm(
        ...     x, [1.0, 1.0], [0.0, 0.0], mean, variance, is_training=False, residual=x, activation="relu6"
        ... )
        >>> print(y.numpy().round(1))
        [[0.3 6. ]
         [3.7 6. ]]
    """
    arguments = convert(
        x,
        scale,
        offset,
        mean,
        variance,
        epsilon,
        data_format,
        is_training,
        exponential_avg_factor,
        axis,
        activation,
        residual,
        unbiased,
        virtual_batch_size,
        in_place,
    )
    if _gpus.need_fallback():
        return _fallback.fused_batch_norm(arguments, name)
    x, scale, offset, mean, variance, residual = arguments[:6]
    dtype, epsilon, exponential_avg_factor, axis, activation, training, unbiased = arguments[6:13]
    common = {
        "residual": [] if residual is None else [residual],
        "axis": axis,
        **float_attribute("epsilon", epsilon, dtype),
        "activation": activation or "",
        "name": name,
    }

    def train() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        y, new_mean, new_variance, *_ = ops.tfops_batch_norm_training(
            x,
            scale,
            offset,
            running=[] if mean is None else [mean, variance],
            **float_attribute("exponential_avg_factor", exponential_avg_factor, dtype),
            unbiased=unbiased,
            virtual_batch_size=arguments.virtual_batch_size or 0,
            in_place=arguments.in_place,
            **common,
        )
        return y, new_mean, new_variance

    def infer() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        y = ops.tfops_batch_norm_inference(x, scale, offset, mean, variance, **common)
        if tf.executing_eagerly():
            return y, mean, variance
        # What a graph returns should be of the graph, and of a shape that is known as far as it can be.
        statistics = tf.identity(mean), tf.identity(variance)
        for statistic in statistics:
            statistic.set_shape([None if y.shape.rank is None else y.shape[axis]])
        return y, *statistics

    try:
        if isinstance(training, bool):
            return tuple(train() if training else infer())
        return tuple(tf.cond(training, lambda: tuple(train()), infer))
    except tf.errors.InvalidArgumentError as error:
        raise tf.errors.InvalidArgumentError(error.node_def, error.op, _own_words(error.message)) from error
    except ValueError as error:
        raise ValueError(_own_words(str(error))) from error


def _own_words(message: str) -> str:
    """What the op says of its arguments, without what TensorFlow adds of the op's inputs and attributes."""
    message = re.sub(r"^\{\{function_node .*?\}\} ", "", message)
    return re.sub(r" for '\{\{node .*| \[Op:.*", "", message, flags=re.DOTALL)
