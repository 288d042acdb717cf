"""The Keras layer's config, weights and files go both ways between Keras and tfops; and it lives as Keras' own does."""

from __future__ import annotations

import copy
import json
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops_testing.fresh_process import run_python
from tfops_testing.requirements import needs_keras

STOCK, FUSED = keras.layers.BatchNormalization, tfops.keras.BatchNormalization
SETTINGS = {
    "axis": 1,
    "momentum": 0.7,
    "epsilon": 0.01,
    "center": False,
    "gamma_initializer": "glorot_uniform",
    "moving_mean_initializer": "ones",
    "gamma_regularizer": "l2",
    "gamma_constraint": "non_neg",
    "synchronized": True,
    "dtype": "mixed_bfloat16",
    "name": "norm",
}
if "renorm" in STOCK().get_config():
    SETTINGS |= {"renorm": True, "renorm_clipping": {"rmax": 3.0}, "renorm_momentum": 0.9}


needs_shared = needs_keras("3.7", "it loads no graph that calls a layer before and after another")


def _model(layer):
    """A new model with a layer of that class: two, one of them shared."""
    inputs = keras.Input((6, 6, 3))
    shared = layer(name="shared")
    x = shared(keras.layers.Conv2D(3, 3, padding="same", name="conv")(shared(inputs)))
    x = keras.layers.ReLU()(layer(momentum=0.5, name="second")(x))
    return keras.Model(inputs, keras.layers.Dense(2, name="dense")(keras.layers.Flatten()(x)))


def _data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((32, 6, 6, 3)).astype(np.float32), rng.standard_normal((32, 2)).astype(np.float32)


def _trained(layer):
    keras.utils.set_random_seed(1)
    model = _model(layer)
    model.compile("sgd", "mse")
    model.fit(*_data(), epochs=1, verbose=0)
    return model


def _assert_same(model, other):
    x, _ = _data()
    np.testing.assert_allclose(other.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


def test_configs_are_those_of_keras():
    ours, theirs = FUSED(**SETTINGS).get_config(), STOCK(**SETTINGS).get_config()
    assert ours == theirs
    assert STOCK.from_config(ours).get_config() == FUSED.from_config(theirs).get_config() == ours
    # An activation is what Keras' layer lacks, and says so.
    activated = FUSED(activation="silu").get_config()
    assert FUSED.from_config(activated).activation == "silu"
    with pytest.raises((TypeError, ValueError), match="activation"):
        STOCK.from_config(activated)


@pytest.mark.parametrize(("saved", "loaded"), [(STOCK, FUSED), (FUSED, STOCK)], ids=["to tfops", "to Keras"])
def test_weights_load_into_either_layer(saved, loaded, tmp_path):
    model, other = _trained(saved), _model(loaded)
    assert [w.path for w in model.weights] == [w.path for w in other.weights]
    for name in ("h.weights.h5", "checkpoint"):
        if name.endswith("h5"):
            model.save_weights(tmp_path / name)
            other.load_weights(tmp_path / name)
        else:
            path = tf.train.Checkpoint(model=model).write(str(tmp_path / name))
            other = _model(loaded)
            tf.train.Checkpoint(model=other).read(path).assert_existing_objects_matched()
        _assert_same(model, other)


@needs_shared
def test_keras_files_load_without_tfops(tmp_path):
    """Where tfops is not imported, its registered name can stand for Keras' layer."""
    model = _trained(FUSED)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.get_layer("shared")) is FUSED
    _assert_same(model, again)
    reader = (
        "import sys, keras, numpy as np; from keras.layers import BatchNormalization as STOCK;"
        "model = keras.models.load_model(sys.argv[1], custom_objects={'tfops>BatchNormalization': STOCK});"
        "assert 'tfops' not in sys.modules; np.save(sys.argv[2], model.predict(np.ones((1, 6, 6, 3)), verbose=0))"
    )
    run = run_python("-c", reader, tmp_path / "model.keras", tmp_path / "y.npy")
    assert run.returncode == 0, run.stderr
    ones = np.ones((1, 6, 6, 3), np.float32)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict(ones, verbose=0), rtol=1e-5, atol=1e-6)


@needs_shared
@pytest.mark.parametrize(("old", "new"), [(STOCK, FUSED), (FUSED, STOCK)], ids=["to tfops", "to Keras"])
def test_clones_with_the_other_layer_agree(old, new, tmp_path):
    """How a .keras file of Keras' layers becomes one of these, and back."""
    _trained(old).save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")

    def replaced(layer):
        return (
            new.from_config(layer.get_config())
            if type(layer) is old
            else layer.__class__.from_config(layer.get_config())
        )

    other = keras.models.clone_model(model, clone_function=replaced)
    other.set_weights(model.get_weights())
    assert type(other.get_layer("second")) is new
    _assert_same(model, other)


@needs_shared
def test_clones_pickles_and_deep_copies_agree():
    model = _trained(FUSED)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for other in (clone, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other.get_layer("shared")) is FUSED
        _assert_same(model, other)
    layer = FUSED(activation="relu")
    layer.build((4, 3))
    layer.moving_mean.assign([1.0, 2.0, 3.0])
    stock = STOCK()
    stock.build((4, 3))
    x = tf.random.normal((4, 3))
    for duplicate in (copy.deepcopy, lambda object: pickle.loads(pickle.dumps(object))):
        try:
            duplicate(stock)
        except Exception as error:  # as far as Keras' own does
            with pytest.raises(type(error)):
                duplicate(layer)
            continue
        other = duplicate(layer)
        np.testing.assert_array_equal(other(x), layer(x))
        other.moving_mean.assign([0.0, 0.0, 0.0])
        np.testing.assert_array_equal(layer.moving_mean, [1, 2, 3])


@needs_shared
def test_json_names_the_layer():
    config = json.loads(_model(FUSED).to_json())
    assert keras.models.model_from_json(json.dumps(config)).get_layer("shared").__class__ is FUSED


# ----------------------------------------------------------------------------------------------------------------------
# Ways to train.


def _losses(layer, **kwargs):
    """What some steps of fit come to."""
    keras.utils.set_random_seed(2)
    model = _model(layer)
    model.compile(keras.optimizers.SGD(0.05, **kwargs.pop("optimizer", {})), "mse", **kwargs)
    data = tf.data.Dataset.from_tensor_slices(_data()).batch(12)  # the last batch is smaller
    stopping = keras.callbacks.EarlyStopping("loss", patience=5, restore_best_weights=True)
    history = model.fit(data, epochs=3, verbose=0, callbacks=[stopping])
    return history.history["loss"] + [model.evaluate(data, verbose=0)]


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"run_eagerly": True}, {"steps_per_execution": 2}, {"optimizer": {"gradient_accumulation_steps": 2}}],
    ids=str,
)
def test_fit_has_the_losses_of_keras(kwargs):
    np.testing.assert_allclose(_losses(FUSED, **copy.deepcopy(kwargs)), _losses(STOCK, **kwargs), rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True], ids=["fused", "phases"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_recompute_grad_changes_no_gradient(graph, masked):
    """The forward pass runs once more for the gradient, which is the same."""
    x = tf.random.stateless_normal((8, 4, 3), (1, 2))
    mask = tf.sequence_mask([1, 4, 2, 3, 4, 4, 1, 2], 4) if masked else None
    results = []
    for recompute in (False, True):
        layer = FUSED(activation="silu", momentum=0.5)
        layer.build(x.shape)

        def step(layer=layer, recompute=recompute):
            def call(x):
                return layer(x, training=True, mask=mask)

            with tf.GradientTape() as tape:
                tape.watch(x)
                y = (tf.recompute_grad(call) if recompute else call)(x)
                loss = tf.reduce_sum(y**3)
            return tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])

        results.append((tf.function(step) if graph else step)())
    for plain, recomputed in zip(*results, strict=True):
        np.testing.assert_allclose(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["fused", "phases"])
def test_second_derivative_agrees_with_keras(masked):
    """A gradient penalty, against Keras' layer."""
    x = tf.random.stateless_normal((6, 4, 3), (1, 2), dtype=tf.float64)
    mask = tf.sequence_mask([1, 4, 2, 3, 4, 4], 4) if masked else None
    results = []
    for cls in (STOCK, FUSED):
        layer = cls(dtype="float64", epsilon=0.0078125)
        layer.build(x.shape)

        @tf.function
        def step(layer=layer):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(layer(x, training=True, mask=mask) ** 3)
                penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
            return outer.gradient(penalty, layer.gamma.value)

        results.append(step())
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6)
