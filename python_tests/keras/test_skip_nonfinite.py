"""skip_nonfinite=True: the layer is, after batches with NaN and Inf, what Keras' layer is that has never seen them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops_testing.requirements import JIT, needs_renorm

STOCK, FUSED = keras.layers.BatchNormalization, tfops.keras.BatchNormalization
PLAIN = pytest.param((6, 5, 7), {}, False, id="plain")
RENORM = pytest.param((6, 5, 7), {"renorm": True, "renorm_momentum": 0.6}, False, id="renorm", marks=needs_renorm)
VARIANTS = [
    PLAIN,
    pytest.param((3, 7, 5), {"axis": 1}, False, id="channels first"),
    pytest.param((6, 5, 7), {}, True, id="mask"),
    RENORM,
    pytest.param((6, 5, 7), {"renorm": True}, True, id="mask+renorm", marks=needs_renorm),
]


def _layer(shape, cls=FUSED, **kwargs):
    layer = cls(momentum=0.75, epsilon=2.0**-7, **kwargs)
    layer.build(shape)
    return layer


def _batches(shape, dtype, axis=-1):
    """Good, with a NaN, good, with an infinity, good: in the last channel but one alone."""
    rng = np.random.default_rng(0)
    batches = rng.normal(1, 2, (5, *shape))
    for step, value in ((1, np.nan), (3, np.inf)):
        np.moveaxis(batches[step], axis, -1)[1, 2, -2] = value
    return [tf.constant(batch, dtype) for batch in batches]


def _step(layer, how="eager", **kwargs):
    """A function of x that returns y and its gradients."""

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, **kwargs)
            loss = tf.reduce_sum(tf.cast(y, tf.float64) ** 2)
        return y, *tape.gradient(loss, [x, *(variable.value for variable in layer.trainable_variables)])

    return step if how == "eager" else tf.function(step, jit_compile=how == "jit")


def _values(layer):
    return [tf.cast(variable.value, tf.float64).numpy() for variable in layer.variables]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize(("shape", "kwargs", "masked"), VARIANTS)
def test_bad_batches_leave_the_layer_as_if_they_had_not_been(shape, kwargs, masked, policy):
    _check("eager", shape, kwargs, masked, policy)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(("shape", "kwargs", "masked"), [PLAIN, RENORM])
@pytest.mark.parametrize("how", ["function", JIT])
def test_bad_batches_leave_the_layer_as_if_they_had_not_been_in_graphs(how, shape, kwargs, masked, policy):
    _check(how, shape, kwargs, masked, policy)


def _check(how, shape, kwargs, masked, policy):
    skipping, plain = (_layer(shape, dtype=policy, skip_nonfinite=skip, **kwargs) for skip in (True, False))
    stock = _layer(shape, STOCK, dtype=policy, **kwargs)
    mask = {"mask": tf.constant(np.arange(30).reshape(6, 5) % 4 > 0)} if masked else {}  # it keeps what is bad
    batches = _batches(shape, skipping.compute_dtype, kwargs.get("axis", -1))
    step = _step(skipping, how, **mask)
    for x in batches:
        # y and gradients are those of a layer that does not skip, NaN included.
        for variable, same in zip(plain.variables, skipping.variables, strict=True):
            variable.assign(same)
        before, wanted = _values(skipping), _step(plain, how, **mask)(x)
        for got, want in zip(step(x), wanted, strict=True):
            np.testing.assert_array_equal(tf.cast(got, tf.float64), tf.cast(want, tf.float64))
        if np.isfinite(tf.cast(x, tf.float64)).all():
            stock(x, training=True, **mask)
        else:
            assert np.isnan(tf.cast(wanted[0], tf.float64)).any()
            assert any(not np.isfinite(value).all() for value in _values(plain))
            for got, want in zip(_values(skipping), before, strict=True):
                np.testing.assert_array_equal(got, want)
    tolerance = 1e-12 if policy == "float64" else 2e-6
    for got, want in zip(_values(skipping), _values(stock), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_without_bad_batches_nothing_changes():
    layers = [_layer((8, 3), skip_nonfinite=skip) for skip in (True, False)]
    for x in (tf.random.stateless_normal((8, 3), (1, 2)), tf.zeros((0, 3))):
        for layer in layers:
            layer(x, training=True)
        for got, want in zip(*map(_values, layers), strict=True):
            np.testing.assert_array_equal(got, want)


def test_what_a_mask_leaves_out_may_be_bad():
    layer = _layer((4, 3, 2), skip_nonfinite=True)
    x = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
    x[0, 1] = np.nan
    mask = np.ones((4, 3), bool)
    mask[0, 1] = False
    layer(x, training=True, mask=mask)
    np.testing.assert_allclose(layer.moving_mean, 0.25 * x[mask].mean(0), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "value"), [("float32", 1e30), ("float16", 1000.0)])
def test_statistics_that_overflow_are_skipped(dtype, value):
    """Finite values whose variance is too large for the moving variance's dtype."""
    layer = _layer((2, 3), dtype=dtype, skip_nonfinite=True)
    y = layer(tf.constant([[1, value, 2], [3, -value, 5]], dtype), training=True)
    np.testing.assert_array_equal(layer.moving_mean, [0, 0, 0])
    np.testing.assert_array_equal(layer.moving_variance, [1, 1, 1])
    assert np.isfinite(y[:, 0]).all()


def test_channels_that_are_bad_already_hold_up_no_other():
    layer = _layer((2, 3), skip_nonfinite=True)
    layer.moving_mean.assign([np.nan, 0.0, 0.0])
    layer(tf.constant([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]), training=True)
    np.testing.assert_array_equal(layer.moving_mean, [np.nan, 0.75, 1.0])


@pytest.mark.parametrize("how", ["eager", "function"])
def test_it_skips_where_the_layer_is_recomputed(how):
    layer, stock = _layer((6, 5, 7), skip_nonfinite=True), _layer((6, 5, 7), STOCK)

    def recomputed(x, **kwargs):
        return tf.recompute_grad(lambda x: layer(x, **kwargs))(x)

    recomputed.trainable_variables = layer.trainable_variables
    step = _step(recomputed, how)
    for x in _batches((6, 5, 7), "float32"):
        step(x)
        if np.isfinite(x).all():
            stock(x, training=True)
    for got, want in zip(_values(layer), _values(stock), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_config_and_files_hold_it(tmp_path):
    assert "skip_nonfinite" not in FUSED().get_config()
    assert FUSED.from_config(STOCK().get_config()).skip_nonfinite is False
    layer = FUSED.from_config(FUSED(skip_nonfinite=True, activation="relu").get_config())
    assert layer.skip_nonfinite
    assert layer.activation == "relu"
    keras.Sequential([keras.Input((3,)), layer]).save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.layers[0].skip_nonfinite is True
    again.layers[0](tf.constant([[np.nan, 1.0, 2.0]]), training=True)
    np.testing.assert_array_equal(again.layers[0].moving_mean, [0, 0, 0])


@pytest.mark.parametrize("value", [None, 1, "channel"])
def test_other_than_a_bool_is_named(value):
    with pytest.raises(TypeError, match=f"skip_nonfinite must be a bool, but it is {value!r}"):
        FUSED(skip_nonfinite=value)


class _Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.BatchNormalization(name="norm")

    def call(self, x, training=None):
        return self.norm(x, training=training)


@pytest.mark.parametrize("subclassed", [False, True])
def test_convert_keeps_it(subclassed):
    if subclassed:
        model = _Net()
        model(tf.ones((4, 3)))
    else:
        inputs = keras.Input((3,))
        model = keras.Model(inputs, keras.layers.ReLU()(keras.layers.BatchNormalization(name="norm")(inputs)))
    fused = tfops.keras.convert(model, verbose=0)
    norm = next(layer for layer in fused.layers if layer.name == "norm")
    norm.skip_nonfinite = True
    again, back = tfops.keras.convert(fused, fold=False, verbose=0), tfops.keras.convert(fused, "keras", verbose=0)
    norm = next(layer for layer in again.layers if layer.name == "norm")
    assert norm.skip_nonfinite is True
    again(tf.constant([[1.0, np.inf, 2.0]]), training=True)
    np.testing.assert_array_equal(norm.moving_variance, [1, 1, 1])
    norm = next(layer for layer in back.layers if layer.name == "norm")
    assert type(norm) is STOCK
    assert not hasattr(norm, "skip_nonfinite")


def test_fit_goes_on_after_a_bad_batch():
    """As with an optimizer that skips such steps too: that of a loss scale."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 5)).astype(np.float32), rng.standard_normal((64, 1)).astype(np.float32)
    x[17, 3] = np.inf
    layers = [keras.Input((5,)), FUSED(activation="silu", skip_nonfinite=True), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), "mse")
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert all(np.isfinite(value).all() for value in model.get_weights())
    assert np.isfinite(model.predict(x[:8], verbose=0)).all()
