"""keras.layers.BatchNormalization on the fused op."""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf

from tfops import _xla
from tfops._arguments import activation_argument, check_in_place, check_virtual_batch_size, param_type
from tfops._batch_norm import fused_batch_norm
from tfops._phases import Statistics, batch_statistics, normalize, replicas
from tfops._virtual_batches import VirtualBatches
from tfops.keras._recomputing import is_recomputed
from tfops.keras._tags import Guarded, tag_applied, tag_pending

OWN_ARGUMENTS = ("activation", "skip_nonfinite", "virtual_batch_size", "in_place")  # which Keras' layer does not take


def check_backend(backend: str) -> None:
    if backend != "tensorflow":
        raise ImportError(
            f"tfops needs Keras' TensorFlow backend, but the backend is {backend!r}: set the environment variable "
            "KERAS_BACKEND=tensorflow before Keras is first imported"
        )


check_backend(keras.backend.backend())


@keras.saving.register_keras_serializable(package="tfops")
class BatchNormalization(Guarded, keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` on the fused kernels, with residual addition and activation in them.

    In training, with mean and variance those of the batch (the population variance, as in Keras):

        y = activation((x - mean) / sqrt(variance + epsilon) * gamma + beta + residual)
        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_variance = momentum * moving_variance + (1 - momentum) * variance

    In inference, and where `trainable` is False, mean and variance are the moving ones, which stay as they are. The
    sources are [Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167), and for `renorm`
    [Ioffe, 2017](https://arxiv.org/abs/1702.03275).

    The layer takes every argument of Keras' layer, with the same defaults, and holds the same weights under the same
    names: gamma, beta, moving_mean and moving_variance of shape [C], C being the size of the dimension `axis`. Without
    the arguments that are new its config is that of Keras' layer. Three things differ in training: `synchronized` holds
    with a mask too, a batch of no elements leaves the moving statistics as they are, and they take a batch in once
    where `tf.recompute_grad` or `keras.RematScope` runs the layer twice (unless a `tf.function` in between runs what
    was traced before).

    Inputs have rank >= 2. The kernels compute in the wider of the inputs' dtype and the layer's compute dtype, with
    sums, statistics and parameters in float32 (float64 for float64); the result has the compute dtype.

    Args:
        axis: The dimension of the channels.
        momentum: The weight of the old moving statistics in the new ones; that of the batch is 1 - momentum.
        epsilon: A number >= 0, added to the variance.
        center: Whether there is a beta.
        scale: Whether there is a gamma.
        beta_initializer: The initializer of beta, as Keras takes them: a name, a config or an object. So are the next.
        gamma_initializer: The initializer of gamma.
        moving_mean_initializer: The initializer of the moving mean.
        moving_variance_initializer: The initializer of the moving variance.
        beta_regularizer: The regularizer of beta, or None.
        gamma_regularizer: The regularizer of gamma, or None.
        beta_constraint: The constraint on beta, or None.
        gamma_constraint: The constraint on gamma, or None.
        renorm: Whether training normalizes by batch renormalization. Some releases of Keras do not have it; they refuse
            this and the next two arguments.
        renorm_clipping: The bounds of its corrections: a dict with any of the keys "rmin", "rmax" and "dmax".
        renorm_momentum: The momentum of its own moving statistics.
        synchronized: Whether statistics are those of all replicas of a `tf.distribute` strategy.
        activation: Applied to the result: None, or one of "relu", "relu6", "leaky_relu" (with slope 0.2), "silu",
            "hard_silu", "gelu" (the exact one), "gelu_tanh" (its approximation), "elu", "selu", "tanh", "sigmoid",
            "softplus" and "mish". Parameters may follow as in a call: "leaky_relu(negative_slope=0.1)",
            "elu(alpha=0.5)", or "relu(max_value=20, negative_slope=0.1, threshold=1)", of which any may be left out.
        skip_nonfinite: Whether a training step in which a moving statistic would become NaN or infinite leaves all of
            the layer's as they are. y and the gradients of that step are what they are.
        virtual_batch_size: In training, of how many consecutive entries of the batch a virtual batch consists, which is
            normalized with its own mean and variance (ghost batch normalization,
            [Hoffer, Hubara and Soudry, 2017](https://arxiv.org/abs/1705.08741)). The moving statistics take in the
            average of all virtual batches' statistics; with a mask, of those in which any element counts, and if there
            is none they stay as they are. Batch sizes are multiples of it. None means that there is one batch.
        in_place: Whether training keeps y alone for the gradient, in the memory of x, and computes x from it again; see
            `tfops.fused_batch_norm`. It goes with the activations None, "leaky_relu" and "elu", and not with `renorm`,
            `synchronized`, `virtual_batch_size`, a mask or a residual.
        **kwargs: What every layer of Keras takes: name, dtype, trainable and so on.

    Attributes:
        activation: As given, or in a plainer form: "relu(max_value=6)" becomes "relu6".
        skip_nonfinite: As given. It may be set, before a training step is compiled. So may the last.
        virtual_batch_size: As given.
        in_place: As given.
        folded: What calls do beside that, unless they tell: an activation, or None. `tfops.keras.convert` sets it in
            Sequential models, whose calls have no arguments.

    Raises:
        TypeError: `skip_nonfinite` or `in_place` is not a bool, or `virtual_batch_size` not an integer.
        ValueError: `activation` is none of the above, `virtual_batch_size` is not positive or does not go together with
            `synchronized` or `renorm`, `in_place` does not go with another argument, or Keras refuses an argument.

    Examples:
        >>> import keras
        >>> import numpy as np
        >>> import tfops
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
        >>> layer = tfops.keras.BatchNormalization(momentum=0.5, activation="relu")
        >>> print(layer(x, training=True).numpy().round(2))
        [[0. 0.]
         [1. 1.]]
        >>> print(layer.moving_mean.numpy())
        [ 1. 10.]

        In a residual block, the layer also adds the shortcut:

        >>> inputs = keras.Input([8, 8, 16])
        >>> y = keras.layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs)
        >>> y = tfops.keras.BatchNormalization(activation="relu")(y, residual=inputs)
        >>> keras.Model(inputs, y).count_params()
        2368

        A batch that has gone bad does not reach the moving statistics:

        >>> layer = tfops.keras.BatchNormalization(momentum=0.5, skip_nonfinite=True)
        >>> for batch in ([[1.0], [3.0]], [[1.0], [float("nan")]]):
        ...     y = layer(np.array(batch, np.float32), training=True)
        >>> print(y.numpy().ravel(), layer.moving_mean.numpy())
        [nan nan] [1.]
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 0.001,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        activation: str | None = None,
        skip_nonfinite: bool = False,
        virtual_batch_size: int | None = None,
        in_place: bool = False,
        **kwargs: Any,
    ):
        activation = activation_argument(activation)
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be a bool, but it is {skip_nonfinite!r}")
        if virtual_batch_size is not None:
            virtual_batch_size = check_virtual_batch_size(virtual_batch_size)
            for name, value in (("synchronized", synchronized), ("renorm", renorm)):
                if value:  # statistics that are corrected, or of more than a batch, are not a virtual batch's own
                    raise ValueError(
                        f"virtual_batch_size must be None where {name} is {value!r}, but it is {virtual_batch_size}"
                    )
        if not isinstance(in_place, bool):
            raise TypeError(f"in_place must be a bool, but it is {in_place!r}")
        if in_place:
            others = {"renorm": renorm, "synchronized": synchronized, "virtual_batch_size": virtual_batch_size}
            check_in_place(activation, **others)
        try:
            axis = int(axis)
        except (TypeError, ValueError) as error:
            raise ValueError(f"axis must be an integer, but it is {axis!r}") from error
        # Older Keras, such as Python 3.10's newest, does not know these: it is given them only if they say something.
        if renorm or renorm_clipping is not None or renorm_momentum != 0.99:
            kwargs |= {"renorm": renorm, "renorm_clipping": renorm_clipping, "renorm_momentum": renorm_momentum}
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            synchronized=synchronized,
            **kwargs,
        )
        self.activation: str | None = activation
        self.skip_nonfinite: bool = skip_nonfinite
        self.virtual_batch_size: int | None = virtual_batch_size
        self.in_place: bool = in_place
        self.folded: str | None = None
        self._last_run: tuple[bool | None, bool] = None, False  # training, and whether there was a mask
        self.supports_jit = _xla.supports_jit()

    # Keras tells the arguments of build and compute_output_shape by name: those of call, and "_shape".
    def build(self, inputs_shape: Any, residual_shape: Any = None) -> None:
        """Makes the weights, as Keras' layer; `residual_shape` has no part in them."""
        super().build(inputs_shape)

    def compute_output_shape(self, inputs_shape: Any, residual_shape: Any = None) -> Any:
        """The shape of the inputs."""
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
        """What a call of the layer computes, `layer(inputs, ...)`.

        Args:
            inputs: The data x: a tensor of rank >= 2.
            training: Whether to normalize with the batch's own statistics, and to update the moving ones. None means
                False; where the layer is recomputed for the gradient, what it meant the first time.
            mask: In training, the elements that statistics are taken of: a tensor of bools, of the inputs' shape
                without the last dimension or one that broadcasts to it. None means all. All elements are normalized.
            residual: A tensor of the inputs' shape, added before the activation, or None.
            inputs_mask: Where Keras puts the inputs' own mask if there is a residual. `mask` goes before it.
            folded: What `tfops.keras.convert` has folded into this call, of the layers that follow. An activation is
                applied, and the layer that follows passes the result on. With "add", or "add+" and an activation, the
                inputs are passed on, and the addition that follows normalizes them. None means the attribute `folded`.

        Returns:
            The result y, a tensor of the inputs' shape and of the compute dtype.

        Raises:
            ValueError: The mask has a wrong rank, or is lost where the layer is recomputed for the gradient, or there
                is one, or a residual, with `in_place`, or shapes do not match while a graph is built.
            tf.errors.InvalidArgumentError: Shapes do not match when the layer runs, or with `in_place` gamma is too
                near 0 in some channel.
        """
        mask = inputs_mask if mask is None else mask
        folded = folded or self.folded
        recomputed = training is not False and is_recomputed()
        if recomputed:
            training = self._as_before(training, mask)
        else:
            self._last_run = training, mask is not None
        if folded is not None and _has_addition(folded):
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
        if self.in_place and training:
            others = {"renorm": renorm, "synchronized": self.synchronized, "mask": mask, "residual": residual}
            check_in_place(settings["activation"], **others)
        if training and mask is not None and self.virtual_batch_size is not None:
            y = self._normalize_virtual_batches(x, mask, scale, offset, recomputed, settings)
        elif training and (mask is not None or renorm or (self.synchronized and replicas() > 1)):
            statistics = batch_statistics(
                x,
                self.axis,
                keep=None if mask is None else _kept(mask, x),
                ballast=0.0 if mask is None else keras.config.epsilon(),  # Keras' masked means have it
                synchronized=self.synchronized,
            )
            if renorm:
                r, d, *_ = self._renorm_correction_and_moments(statistics.mean, statistics.variance)
                scale, offset = self._compose_transforms(r, d, scale, offset, param)
            if not recomputed:
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
                virtual_batch_size=self.virtual_batch_size,
                in_place=self.in_place and training,
                **settings,
            )
            if training and not recomputed:
                self._assign({"moving_mean": mean, "moving_variance": variance})
        return tf.cast(y, self.compute_dtype)

    def _normalize_virtual_batches(
        self,
        x: tf.Tensor,
        mask: Any,
        scale: tf.Tensor,
        offset: tf.Tensor,
        recomputed: bool,
        settings: dict[str, Any],
    ) -> tf.Tensor:
        """y in training with a mask, of whose elements each virtual batch has statistics of its own."""
        batches = VirtualBatches(x, self.axis, self.virtual_batch_size or 0)
        folded = batches.fold(x)
        # Keras' masked means have the ballast.
        keep, ballast = batches.fold_keep(_kept(mask, x)), keras.config.epsilon()
        statistics = batch_statistics(folded, batches.axis, keep=keep, ballast=ballast)
        if not recomputed:
            counts = tf.cast(statistics.count > 0, statistics.mean.dtype)
            taken = batches.sum(counts)

            def average(vector: tf.Tensor) -> tf.Tensor:
                return tf.math.divide_no_nan(batches.sum(counts * vector), taken)

            mean, variance = average(statistics.mean), average(statistics.variance)
            self._update(Statistics(taken, mean, variance, 0.0, None, synchronized=False), renorm=False)
        residual = settings["residual"]
        settings = {
            **settings,
            "axis": batches.axis,
            "residual": None if residual is None else batches.fold(residual),
        }
        return batches.unfold(normalize(folded, batches.tile(scale), batches.tile(offset), statistics, **settings))

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

    def _as_before(self, training: bool | None, mask: Any) -> bool | None:
        """`training` where the layer runs again: layers that call others are not under way then, and do not tell."""
        before, had_mask = self._last_run
        training = before if training is None else training
        if training and had_mask and mask is None:
            raise ValueError(
                f"the mask of {self.name} is lost where it is recomputed for the gradient: tf.recompute_grad does not "
                "pass on what tensors carry. Give it by name, layer(x, mask=mask)"
            )
        return training

    def _update(self, statistics: Statistics, renorm: bool) -> None:
        """The moving statistics: Keras' averages, but no elements leave them as they are."""
        mean, variance = statistics.mean, statistics.variance
        taken = statistics.count + statistics.ballast > 0

        def average(name: str, value: tf.Tensor, momentum: float) -> tf.Tensor:
            old = tf.cast(getattr(self, name), value.dtype)
            return tf.where(taken, old * momentum + value * (1.0 - momentum), old)

        averages = {"moving_mean": average("moving_mean", mean, self.momentum)}
        if renorm:
            stddev = tf.sqrt(variance + self.epsilon)
            averages["renorm_mean"] = average("renorm_mean", mean, self.renorm_momentum)
            averages["renorm_stddev"] = average("renorm_stddev", stddev, self.renorm_momentum)
            averages["moving_stddev"] = average("moving_stddev", stddev, self.momentum)
            moving_variance = tf.nn.relu(tf.square(averages["moving_stddev"]) - self.epsilon)
            averages["moving_variance"] = average("moving_variance", moving_variance, 0.0)
        else:
            averages["moving_variance"] = average("moving_variance", variance, self.momentum)
        self._assign(averages)

    def _assign(self, averages: dict[str, tf.Tensor]) -> None:
        """New values of the moving statistics, by their names. With `skip_nonfinite`, all of them or none."""
        variables = [getattr(self, name) for name in averages]
        values = [tf.cast(each, variable.dtype) for each, variable in zip(averages.values(), variables, strict=True)]
        if self.skip_nonfinite:
            new, old = tf.stack(values), tf.stack([tf.cast(each, each.dtype) for each in variables])
            # What is not finite already, as in a file of old, does not keep the others from being updated.
            good = tf.reduce_all(tf.math.is_finite(new) | ~tf.math.is_finite(old))
            values = tf.unstack(tf.where(good, new, old), len(values))
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor; without those that are new, a config for Keras' layer too."""
        own = {
            "activation": self.activation,
            "folded": self.folded,
            "skip_nonfinite": self.skip_nonfinite or None,
            "virtual_batch_size": self.virtual_batch_size,
            "in_place": self.in_place or None,
        }
        return {**super().get_config(), **{name: value for name, value in own.items() if value is not None}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BatchNormalization:
        """A layer like the one that the config was taken of, without its weights."""
        config = dict(config)
        folded = config.pop("folded", None)
        layer: BatchNormalization = super().from_config(config)
        layer.folded = folded
        return layer


def _kept(mask: Any, x: tf.Tensor) -> tf.Tensor:
    """The mask as bools of x's shape without its last dimension."""
    return tf.broadcast_to(tf.cast(mask, tf.bool), tf.shape(x)[:-1])


def _has_addition(folded: str | None) -> bool:
    return folded is not None and folded.startswith("add")
