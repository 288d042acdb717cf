"""`virtual_batch_size` of the Keras layer: fit, configs, files, masks and errors."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops_testing.requirements import JIT, needs_renorm

FUSED = tfops.keras.BatchNormalization
MOMENTUM, EPSILON = 0.75, 2.0**-7


def _layer(**kwargs):
    return FUSED(momentum=MOMENTUM, epsilon=EPSILON, **kwargs)


def _wanted(x, size, axis=-1, mask=None, gamma=1.0, beta=0.0):
    """y, and the averages of mean and variance, in float64 NumPy; of virtual batches that have any element."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    y, statistics = np.empty_like(x), []
    for i in range(0, len(x), size):
        part = x[i : i + size]
        rows = part.reshape(-1, x.shape[-1])
        kept = rows if mask is None else part[np.asarray(mask)[i : i + size]]
        mean, variance = (kept.mean(0), kept.var(0)) if len(kept) else (np.zeros(x.shape[-1]),) * 2
        if len(kept):
            statistics.append((mean, variance))
        y[i : i + size] = (part - mean) / np.sqrt(variance + EPSILON) * gamma + beta
    averages = np.mean(statistics, 0) if statistics else None
    return np.moveaxis(y, -1, axis), averages


def _assert_moved(layer, averages, before=(0.0, 1.0)):
    for variable, old, new in zip((layer.moving_mean, layer.moving_variance), before, averages, strict=True):
        np.testing.assert_allclose(variable, MOMENTUM * old + (1 - MOMENTUM) * new, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "size"), [((6, 5, 7), -1, 2), ((8, 3, 4, 4), 1, 4), ((6, 1), -1, 3)], ids=str
)
def test_training(shape, axis, size):
    x = np.random.default_rng(0).normal(1, 2, shape).astype(np.float32)
    layer = _layer(axis=axis, virtual_batch_size=size)
    y = layer(x, training=True)
    want, averages = _wanted(x, size, axis)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    _assert_moved(layer, averages)
    one = _layer(axis=axis, virtual_batch_size=shape[0])
    whole = _layer(axis=axis)
    np.testing.assert_array_equal(one(x, training=True), whole(x, training=True))
    # Elsewhere it has no effect, and any batch will do.
    for training in (False, None):
        stock = keras.layers.BatchNormalization(axis=axis, epsilon=EPSILON)
        stock.build(shape)
        stock.set_weights(layer.get_weights())
        np.testing.assert_allclose(layer(x[:1], training=training), stock(x[:1]), rtol=1e-4, atol=1e-4)


def _network(size):
    inputs = keras.Input([4, 4, 3])
    y = keras.layers.Conv2D(5, 3, padding="same", use_bias=False)(inputs)
    y = FUSED(activation="relu", virtual_batch_size=size, name="ghost")(y)
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(y))
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("how", ["eager", "graph", JIT])
def test_fit(how):
    keras.utils.set_random_seed(0)
    model = _network(4)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 4, 4, 3)).astype(np.float32), rng.standard_normal((32, 2)).astype(np.float32)
    settings = {"run_eagerly": how == "eager", "jit_compile": how == "jit"}
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", **settings)
    history = model.fit(x, y, batch_size=16, epochs=6, verbose=0, shuffle=False)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert np.abs(model.get_layer("ghost").moving_mean).max() > 0


@pytest.mark.parametrize("suffix", [".keras", "", ".weights"])
def test_files(tmp_path, suffix):
    """The layer comes back with its virtual batches, to be trained on; older configs know nothing of them."""
    keras.utils.set_random_seed(0)
    model = _network(2)
    x = np.random.default_rng(0).standard_normal((8, 4, 4, 3)).astype(np.float32)
    model(x, training=True)
    if suffix == ".keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert loaded.get_layer("ghost").virtual_batch_size == 2
    elif suffix == ".weights":
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = _network(None)
        loaded.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_array_equal(loaded(x), model(x))
        return
    else:
        tf.saved_model.save(model, str(tmp_path / "model"))
        restored = tf.saved_model.load(str(tmp_path / "model"))
        np.testing.assert_allclose(
            restored.signatures["serving_default"](tf.constant(x))["output_0"], model(x), rtol=1e-5
        )
        trained = tf.Module()
        trained.model = model
        trained.step = tf.function(lambda x: model(x, training=True), input_signature=[tf.TensorSpec([None, 4, 4, 3])])
        tf.saved_model.save(trained, str(tmp_path / "step"))
        again = tf.saved_model.load(str(tmp_path / "step"))
        want = model(x, training=True)
        np.testing.assert_allclose(again.step(tf.constant(x)), want, rtol=1e-5)
        return
    np.testing.assert_array_equal(loaded(x, training=True), model(x, training=True))
    np.testing.assert_array_equal(loaded.get_layer("ghost").moving_mean, model.get_layer("ghost").moving_mean)


def test_config():
    layer = _layer(virtual_batch_size=4, activation="relu")
    config = layer.get_config()
    assert config["virtual_batch_size"] == 4
    assert FUSED.from_config(config).get_config() == config
    assert keras.layers.deserialize(keras.layers.serialize(layer)).virtual_batch_size == 4
    assert "virtual_batch_size" not in _layer().get_config()
    assert FUSED.from_config(keras.layers.BatchNormalization().get_config()).virtual_batch_size is None
    assert FUSED(virtual_batch_size=np.int64(4)).get_config()["virtual_batch_size"] == 4


@pytest.mark.parametrize("how", ["eager", "graph", JIT])
@pytest.mark.parametrize(("shape", "axis"), [((6, 5, 7), -1), ((6, 4, 3, 5), 1)], ids=str)
def test_mask(shape, axis, how):
    """Statistics are of what is kept in each virtual batch; one that keeps nothing is no part of the average."""
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, shape).astype(np.float32)
    mask = rng.random(shape[:-1]) < 0.7
    mask[2:4] = False
    layer = _layer(axis=axis, virtual_batch_size=2, activation="silu")
    layer.build(shape)
    residual = rng.standard_normal(shape).astype(np.float32)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask, residual=residual)
            loss = tf.reduce_sum(y * y)
        return y, tape.gradient(loss, x)

    y, gradient = (step if how == "eager" else tf.function(step, jit_compile=how == "jit"))(tf.constant(x))
    # Channel by channel, for with channels first a row of the mask is of one channel alone.
    channels = np.moveaxis(x, axis, -1).astype(np.float64)
    kept = np.moveaxis(np.broadcast_to(mask[..., None], shape), axis, -1)
    want, statistics = np.empty(channels.shape), []
    for c in range(shape[axis]):
        for i in range(0, len(x), 2):
            part = channels[i : i + 2, ..., c]
            chosen = part[kept[i : i + 2, ..., c]]
            mean, variance = (chosen.mean(), chosen.var()) if len(chosen) else (0.0, 0.0)
            want[i : i + 2, ..., c] = (part - mean) / np.sqrt(variance + EPSILON)
            statistics.append((c, mean, variance, len(chosen) > 0))
    z = np.moveaxis(want, -1, axis) + residual
    np.testing.assert_allclose(y, z / (1 + np.exp(-z)), rtol=1e-3, atol=1e-3)
    of_channel = [[s[1:3] for s in statistics if s[0] == c and s[3]] for c in range(shape[axis])]
    _assert_moved(layer, np.transpose([np.mean(s, 0) for s in of_channel]))

    def loss_of(x):
        """The same by slices: each virtual batch by itself."""
        parts = []
        for i in range(0, shape[0], 2):
            whole = _layer(axis=axis, activation="silu")
            parts.append(whole(x[i : i + 2], training=True, mask=mask[i : i + 2], residual=residual[i : i + 2]))
        y = tf.concat(parts, 0)
        return tf.reduce_sum(y * y)

    tensor = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        loss = loss_of(tensor)
    np.testing.assert_allclose(gradient, tape.gradient(loss, tensor), rtol=1e-3, atol=1e-3)


def test_conversion():
    """Keras' layer has no virtual batches; a copy of tfops' own has."""
    model = _network(2)
    stock = tfops.keras.convert(model, to="keras")
    x = np.random.default_rng(0).standard_normal((3, 4, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(stock(x), model(x), rtol=1e-5, atol=1e-6)
    assert not hasattr(stock.get_layer("ghost"), "virtual_batch_size")
    assert tfops.keras.convert(stock).get_layer("ghost").virtual_batch_size is None
    assert keras.models.clone_model(model).get_layer("ghost").virtual_batch_size == 2


def test_nothing_kept_leaves_the_moving_statistics():
    layer = _layer(virtual_batch_size=2)
    layer(np.ones((4, 3, 5), np.float32), training=True, mask=np.zeros((4, 3), bool))
    np.testing.assert_array_equal(layer.moving_mean, 0)
    np.testing.assert_array_equal(layer.moving_variance, 1)


def test_errors():
    with pytest.raises(ValueError, match="virtual_batch_size must be > 0 or None, but it is 0"):
        _layer(virtual_batch_size=0)
    with pytest.raises(TypeError, match="virtual_batch_size must be an integer or None, but it is 'two'"):
        _layer(virtual_batch_size="two")
    with pytest.raises(ValueError, match="virtual_batch_size must be None where synchronized is True, but it is 2"):
        _layer(virtual_batch_size=2, synchronized=True)
    layer = _layer(virtual_batch_size=4)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="virtual_batch_size must divide the batch"):
        layer(np.ones((6, 3), np.float32), training=True)
    layer = _layer(virtual_batch_size=4)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="virtual_batch_size must divide the batch"):
        layer(np.ones((6, 2, 3), np.float32), training=True, mask=np.ones((6, 2), bool))


@needs_renorm
def test_not_with_renorm():
    with pytest.raises(ValueError, match="virtual_batch_size must be None where renorm is True, but it is 2"):
        _layer(virtual_batch_size=2, renorm=True)


def test_skip_nonfinite_and_recomputation():
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    layer = _layer(virtual_batch_size=2, skip_nonfinite=True)
    layer(np.where(x == x[0], np.nan, x), training=True)
    np.testing.assert_array_equal(layer.moving_mean, 0)
    plain = _layer(virtual_batch_size=2)
    plain.build(x.shape)
    tensor = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        y = tf.recompute_grad(lambda x: plain(x, training=True))(tensor)
        loss = tf.reduce_sum(y**3)
    tape.gradient(loss, tensor)
    _assert_moved(plain, _wanted(x, 2)[1])
