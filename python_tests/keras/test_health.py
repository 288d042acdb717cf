"""`BatchNormHealth` finds what was planted, in the right place and at the right time, and nothing else."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfops
from tfops import _xla
from tfops.keras import BatchNormHealth
from tfops_testing.fresh_process import run_python
from tfops_testing.health_models import expected_drift, fit, make_data, make_net

NORMS = pytest.mark.parametrize("norm", [layers.BatchNormalization, tfops.keras.BatchNormalization])
MODES = {
    "eager": {"run_eagerly": True, "jit_compile": False},
    "graph": {"jit_compile": False},
    "XLA": {"jit_compile": True},
}


pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def _places(health):
    return [(finding.layer, finding.kind, finding.variable, finding.channels) for finding in health.findings]


@NORMS
def test_nothing_is_found_in_a_healthy_model(norm):
    x = make_data(200)
    health = BatchNormHealth(data=x, each_batch=True)
    history = fit(make_net(norm, rate=1e-2, momentum=0.5), health, x, epochs=2, batch_size=50)
    assert health.findings == []
    assert health.report() == "nothing found"
    for name in ("nonfinite", "dead", "drift"):
        assert history[f"batch_norm_{name}_channels"] == [0, 0]


@NORMS
@pytest.mark.parametrize("mode", MODES)
def test_bad_batch_is_found_where_it_enters(norm, mode):
    """Statistics of one channel of the first layer; of all behind it; and all parameters, through the gradients."""
    if mode == "XLA" and not _xla.supports_jit():
        pytest.skip("XLA has no kernels here")
    x = make_data(40)
    x[19, 3] = np.inf  # in batch 2 of 5
    model = make_net(norm, rate=1e-2)
    model.compile(keras.optimizers.SGD(1e-2), "mse", **MODES[mode])
    health = BatchNormHealth("log", each_batch=True)
    history = fit(model, health, x)
    assert all((each.epoch, each.batch, each.kind) == (0, 2, "nonfinite") for each in health.findings)
    first, second = (
        {each.variable: each.channels for each in health.findings if each.layer == name} for name in ("first", "second")
    )
    assert first["moving_mean"] == first["moving_variance"] == (3,)
    assert second["moving_mean"] == second["moving_variance"] == (0, 1, 2, 3)
    assert _places(health)[0] == ("first", "nonfinite", "moving_mean", (3,))
    assert first["gamma"] == first["beta"] == (0, 1, 2, 3, 4)
    assert second["gamma"] == second["beta"] == (0, 1, 2, 3)
    assert history["batch_norm_nonfinite_channels"] == [9]


def test_bad_batch_is_found_at_the_end_of_the_epoch_without_each_batch():
    x = make_data()
    x[1, 3] = np.nan
    health = BatchNormHealth("log")
    fit(make_net(), health, x)
    assert {(each.epoch, each.batch) for each in health.findings} == {(0, None)}


def test_data_that_are_not_finite_are_found():
    x = make_data()
    x[1, 3] = np.nan
    health = BatchNormHealth("log", data=x)
    fit(make_net(), health, make_data())
    assert _places(health)[:2] == [("first", "nonfinite", f"batch_{name}", (3,)) for name in ("mean", "variance")]
    assert {each.layer for each in health.findings} == {"first", "second"}


@NORMS
def test_dead_channels_are_found(norm):
    x = make_data()
    x[:, 1] = 7
    model = make_net(norm, momentum=0.0)
    model.get_layer("first").gamma.assign([1, 2, -3, 0.0029, -0.0031])  # relative to 3
    health = BatchNormHealth("log")
    history = fit(model, health, x, epochs=2)
    assert _places(health) == [("first", "dead", "moving_variance", (1,)), ("first", "dead", "gamma", (3,))]
    assert health.findings[1].values == (np.float64(np.float32(0.0029)),)
    assert history["batch_norm_dead_channels"] == [2, 2]
    # Thresholds; and a layer of zeros alone is dead.
    model.get_layer("second").gamma.assign(np.zeros(4))
    strict = BatchNormHealth("log", scale_threshold=0.0, variance_threshold=1e9)
    fit(model, strict, x)
    dead = {(layer, variable): channels for layer, _, variable, channels in _places(strict)}
    assert dead == {
        ("first", "moving_variance"): (0, 1, 2, 3, 4),
        ("second", "moving_variance"): (0, 1, 2, 3),
        ("second", "gamma"): (0, 1, 2, 3),
    }


def test_without_scale_and_center():
    x = make_data(200)
    health = BatchNormHealth("log", data=x)
    fit(make_net(scale=False, center=False, momentum=0.2), health, x, batch_size=50)
    assert health.findings == []


@NORMS
@pytest.mark.parametrize("policy", ["float32", "float64", "mixed_bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), -1), ((3, 5), 1), ((2, 5, 3), 3)], ids=str)
def test_drift_is_that_of_numpy(norm, policy, shape, axis):
    """At every channel, for a layer that has drifted from what it is given."""
    inputs = keras.Input(shape)
    model = keras.Model(inputs, norm(axis=axis, dtype=policy, name="norm", momentum=1.0, epsilon=0.01)(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    layer = model.get_layer("norm")
    rng = np.random.default_rng(1)
    layer.moving_mean.assign(rng.standard_normal(3))
    layer.moving_variance.assign(rng.uniform(0.1, 4, 3))
    data = rng.standard_normal([7, *shape]).astype(np.float32) * 2 + 1
    health = BatchNormHealth("log", data=data, drift_threshold=0.0)
    history = fit(model, health, data)
    seen = data.astype(policy) if policy != "mixed_bfloat16" else tf.cast(data, "bfloat16")
    axes = tuple(i for i in range(len(shape) + 1) if i != axis % (len(shape) + 1))
    drifts = expected_drift(seen, layer, axes)
    assert _places(health) == [("norm", "drift", f"moving_{name}", (0, 1, 2)) for name in ("mean", "variance")]
    for finding, drift, name in zip(health.findings, drifts, ("mean", "variance"), strict=True):
        np.testing.assert_allclose(finding.values, drift, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(history[f"batch_norm_largest_{name}_drift"], np.abs(drift).max(), rtol=1e-12)


def test_drift_is_found_beyond_the_threshold():
    data = make_data(1000) - make_data(1000).mean(axis=0)
    data /= data.std(axis=0)
    model = make_net(momentum=1.0, epsilon=0.0)
    model.get_layer("first").moving_mean.assign([0, 0.9, 1.1, -1.1, 0])
    model.get_layer("first").moving_variance.assign([np.exp(0.9), 1, 1, 1, np.exp(-1.1)])
    health = BatchNormHealth("log", data=data)
    fit(model, health, data[:8])
    found = [each[1:] for each in _places(health) if each[0] == "first"]
    assert found == [("drift", "moving_mean", (2, 3)), ("drift", "moving_variance", (4,))]


def test_drift_behind_other_layers_is_that_of_inference():
    """Of `second`, whose input NumPy computes with the moving statistics of `first`."""
    model, data = make_net(momentum=0.9), make_data()
    health = BatchNormHealth("log", data=data, drift_threshold=0.0)
    fit(model, health, make_data() + 1)
    first, dense = model.get_layer("first"), model.get_layer("dense")
    mean, variance, kernel = (np.float64(v) for v in (first.moving_mean, first.moving_variance, dense.kernel))
    y = (np.float64(data) - mean) / np.sqrt(variance + first.epsilon) @ kernel
    want = expected_drift(y, model.get_layer("second"), 0)
    got = [each.values for each in health.findings if each.layer == "second"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@NORMS
def test_drift_with_a_mask_is_of_what_it_keeps(norm):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([5, 3]), layers.Masking(), norm(name="norm", momentum=0.5)])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    x = np.random.default_rng(0).standard_normal([6, 5, 3]).astype(np.float32) + 3
    keep = np.random.default_rng(1).random([6, 5]) < 0.6
    x[~keep] = 0
    health = BatchNormHealth("log", data=x, drift_threshold=0.0)
    fit(model, health, x)
    want = expected_drift(x[keep], model.get_layer("norm"), 0)
    np.testing.assert_allclose([each.values for each in health.findings], want, rtol=1e-12)


def test_conversion_does_not_change_the_drift():
    """With an addition and an activation folded in, of which the former has the layer called twice."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([4, 4, 3])
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(3, 3, padding="same")(inputs))
    y = layers.ReLU()(layers.Add()([y, inputs]))
    model = keras.Model(inputs, layers.ReLU()(layers.BatchNormalization(name="other")(y)))
    x = np.random.default_rng(0).standard_normal([6, 4, 4, 3]).astype(np.float32)
    found = []
    for each in (model, tfops.keras.convert(model, verbose=0)):
        each.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
        health = BatchNormHealth("log", data=x, drift_threshold=0.0)
        each.fit(x, np.zeros([6, 4, 4, 3]), verbose=0, callbacks=[health])
        found.append(health.findings)
    assert len(found[0]) == 4
    for stock, fused in zip(*found, strict=True):
        assert fused[:-1] == stock[:-1]
        np.testing.assert_allclose(fused.values, stock.values, rtol=1e-4, atol=1e-5)


class Stateful(layers.Layer):
    """Changes its state in inference too."""

    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign(self.calls + 1)
        self.add_loss(1e-3 * keras.ops.mean(x * x))
        return x


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_training_is_the_same_to_the_last_bit(mode):
    """The looks change neither weights nor random numbers nor losses."""
    results = []
    for callbacks in ([], [BatchNormHealth("log", data=make_data(), every=1, each_batch=True)]):
        keras.utils.set_random_seed(0)
        stack = [layers.Dense(6, activity_regularizer="l2"), tfops.keras.BatchNormalization(), Stateful()]
        model = keras.Sequential([keras.Input([5]), *stack, layers.Dropout(0.5), layers.Dense(1)])
        model.compile("adam", "mse", **MODES[mode])
        y = np.ones([24, 1])
        history = model.fit(
            make_data(), y, 8, 3, verbose=0, callbacks=callbacks, validation_data=(make_data(), y)
        ).history
        results.append(([w.numpy() for w in model.weights], history["loss"], history["val_loss"]))
    for got, want in zip(*results, strict=True):
        assert all(map(np.array_equal, got, want))


class Block(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.norms = [tfops.keras.BatchNormalization(name="norm") for _ in range(2)]

    def call(self, x, training=None):
        for norm in self.norms:
            x = norm(x, training=training)
        return x


class Compiled(Block):
    call = tf.function(Block.call)


def test_every_batch_norm_has_a_path_of_its_own():
    """In models in models, in layers of one's own and wrappers; a shared layer has one."""
    shared = layers.BatchNormalization(name="shared")
    inside = keras.Sequential([keras.Input([5, 3]), layers.BatchNormalization(name="norm")], name="inside")
    inputs = keras.Input([5, 3])
    y = inside(shared(shared(inputs)))
    y = keras.Model(inputs, y, name="outer")(inputs)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.TimeDistributed(layers.BatchNormalization(name="norm"), name="timed")(y)
    model = keras.Model(inputs, Compiled(name="block")(y))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    x = np.random.default_rng(0).standard_normal([6, 5, 3]).astype(np.float32) + 2
    health = BatchNormHealth("log", data=x, drift_threshold=0.0)
    fit(model, health, x)
    found = {each.layer: each for each in health.findings if each.variable == "moving_mean"}
    assert set(found) == {"outer/shared", "outer/inside/norm", "norm", "timed/norm", "block/norm", "block/norm_1"}
    # The moving statistics take in one call after the other: so do their counterparts here.
    once = np.float64(x)
    twice = (once - np.float64(shared.moving_mean)) / np.sqrt(np.float64(shared.moving_variance) + shared.epsilon)
    mean = (once.mean(axis=(0, 1)) + twice.mean(axis=(0, 1))) / 2
    want = (mean - np.float64(shared.moving_mean)) / np.sqrt(np.float64(shared.moving_variance) + shared.epsilon)
    np.testing.assert_allclose(found["outer/shared"].values, want, rtol=1e-5)


def test_models_that_are_built_by_their_first_batch():
    model = Block()
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    x = make_data()
    x[3, 2] = np.nan
    health = BatchNormHealth("log", each_batch=True)
    model.fit(x, x, 8, shuffle=False, verbose=0, callbacks=[health])
    assert {(each.layer, each.batch) for each in health.findings} >= {("norm", 0), ("norm_1", 0)}


@pytest.fixture(scope="module")
def replicas():
    run = run_python("-m", "tfops_testing.health_check")
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["stock", "healthy", "synchronized", "bad"])
def test_two_replicas(replicas, name):
    result = replicas[name]
    if name == "bad":
        epoch, batch, layer, kind, variable, channels, _ = result["findings"][0]
        assert (epoch, batch, layer, kind) == (0, 1, "norm", "nonfinite")
        assert (variable, channels) == ("moving_mean", [3])
        return
    assert result["findings"] == []
    assert result["history"]["batch_norm_nonfinite_channels"] == [0, 0]
    np.testing.assert_allclose(result["history"]["batch_norm_largest_mean_drift"][-1], result["drift"], rtol=1e-5)
