"""What `convert` makes of models of the user's own classes, with attributes, configs and functions of their own."""

from __future__ import annotations

import dataclasses
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfops
from tfops.keras import convert
from tfops_testing.requirements import needs_keras

Norm = layers.BatchNormalization


def _images(*shape):
    return tf.random.stateless_normal(shape or (6, 4, 4, 3), (0, 0))


def _assert_same(got, want, x=None):
    x = _images() if x is None else x
    for training in (False, True):
        pairs = zip(*(keras.tree.flatten(each(x, training=training)) for each in (got, want)), strict=True)
        for y, z in pairs:
            np.testing.assert_allclose(y, z, rtol=0, atol=2e-5 * (np.abs(z).max() + 0.1))
    for variable, other in zip(got.variables, want.variables, strict=True):
        assert variable.path == other.path
        np.testing.assert_allclose(variable, other, rtol=1e-5, atol=1e-5)


def _randomize(model):
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def _folds(model):
    calls = [node for layer in model._flatten_layers() for node in layer._inbound_nodes]
    return [folded for node in calls if (folded := node.arguments.kwargs.get("folded"))]


@dataclasses.dataclass
class Settings:
    factor: float
    last: layers.Layer


@keras.saving.register_keras_serializable(package="test")
class Backbone(keras.Model):
    """A graph of another width, if made without arguments; with all kinds of attributes."""

    def __init__(self, width=4, **kwargs):
        x = keras.Input((4, 4, 3), name="images")
        y = layers.Conv2D(width, 1, name="stem")(x)
        one = layers.ReLU(name="one_relu")(layers.Add(name="one_add")([Norm(name="one")(y), y]))
        two = layers.ReLU(name="two_relu")(Norm(name="two")(layers.Conv2D(width, 1, name="conv")(one)))
        super().__init__(x, two, **kwargs)
        self.width = width
        self.temperature = 1.0
        self.pyramid_outputs = {"P1": one, "P2": two}
        self.norms = [self.get_layer("one"), (self.get_layer("two"), "a note")]
        self.settings = Settings(2.0, self.get_layer("conv"))
        self.steps = keras.metrics.Mean(name="steps")
        self.side = keras.Model(x, layers.Dense(2, name="side_dense")(two), name="side")

    def features(self, x):
        return keras.Model(self.input, self.pyramid_outputs)(x)

    def get_config(self):
        return {"width": self.width, "name": self.name}


@keras.saving.register_keras_serializable(package="test")
class Task(keras.Model):
    def __init__(self, backbone, classes=2, **kwargs):
        x = backbone.input
        super().__init__(x, layers.Dense(classes, name="head")(backbone(x)), **kwargs)
        self.backbone, self.classes = backbone, classes
        self.compile("adam", "mse")

    def get_config(self):
        return {"backbone": keras.saving.serialize_keras_object(self.backbone), "classes": self.classes}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("backbone")), **config)


class Anything(keras.Model):
    """Takes anything, as functional models do, but makes a graph of its own."""

    def __init__(self, *args, width=4, **kwargs):
        x = keras.Input((4, 4, 3))
        y = layers.ReLU()(Norm()(layers.Conv2D(width, 1)(x)))
        super().__init__(x, layers.Dense(2)(y), **kwargs)
        self.width = width

    def get_config(self):
        return {"width": self.width}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class NoConfig(keras.Model):
    """Can only be made with an object, which its config does not have."""

    def __init__(self, activation):
        x = keras.Input((4, 4, 3))
        super().__init__(x, layers.Dense(2)(activation(Norm(name="norm")(x))))


def test_attributes_of_a_functional_class_are_kept():
    model = _randomize(Backbone(width=5, name="backbone"))
    model.temperature = 3.0
    model.steps.update_state(1.0)
    fused = convert(model, verbose=0)
    assert type(fused) is Backbone
    assert fused.name == "backbone"
    assert fused.get_config() == {"width": 5, "name": "backbone"}
    assert fused.temperature == 3.0
    assert sorted(_folds(fused)) == ["add+relu", "relu"]
    for got, want in zip(fused.features(_images()).values(), model.features(_images()).values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    # Everything in the attributes is the copy's.
    assert fused.norms[0] is fused.get_layer("one")
    assert fused.norms[1] == (fused.get_layer("two"), "a note")
    assert (fused.settings.factor, fused.settings.last) == (2.0, fused.get_layer("conv"))
    assert model.settings.last is model.get_layer("conv")
    assert fused.steps is not model.steps
    assert [layer.name for layer in fused.side.layers] == [layer.name for layer in model.side.layers]
    assert fused.side.layers[-2] is fused.get_layer("two_relu")
    _assert_same(convert(fused, to="keras", verbose=0), convert(model, fold=False, verbose=0))
    _assert_same(fused, model)


def test_attributes_are_not_shared():
    model = Backbone()
    fused = convert(model, verbose=0)
    fused.pyramid_outputs.clear()
    fused.norms.append(1)
    fused.settings.factor = 5.0
    assert set(model.pyramid_outputs) == {"P1", "P2"}
    assert len(model.norms) == 2
    assert model.settings.factor == 2.0


def test_nested_models_of_functional_classes_keep_their_classes():
    model = _randomize(Task(Backbone(width=5), classes=3, name="task"))
    fused = convert(model, verbose=0)
    assert (type(fused), type(fused.backbone), fused.classes) == (Task, Backbone, 3)
    assert fused.backbone is fused.get_layer(model.backbone.name)
    assert fused.backbone.width == 5
    assert sorted(_folds(fused)) == ["add+relu", "relu"]
    _assert_same(fused, model)


@pytest.mark.parametrize("make", [lambda: Backbone(width=5), lambda: Task(Backbone(width=5), classes=3)])
def test_saved_copies_of_functional_classes_hold_the_weights(make, tmp_path):
    """Their own config makes the stock model, whose weights are in the same order."""
    model = _randomize(make())
    fused = convert(model, verbose=0)
    fused.save(tmp_path / "fused.keras")
    fused.save_weights(tmp_path / "fused.weights.h5")
    again = keras.models.load_model(tmp_path / "fused.keras")
    other = make()
    other.load_weights(tmp_path / "fused.weights.h5")
    for each in (again, other):
        assert type(each) is type(model)
        assert not _folds(each)
        for got, want in zip(each.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(got, want)
        assert sorted(_folds(convert(each, verbose=0))) == ["add+relu", "relu"]


def test_classes_that_take_any_keyword_are_kept():
    model = _randomize(Anything(width=6))
    fused = convert(model, verbose=0)
    assert (type(fused), fused.width) == (Anything, 6)
    assert _folds(fused) == ["relu"]
    _assert_same(fused, model)


@pytest.mark.filterwarnings("ignore:the optimizer of")
def test_classes_without_a_usable_config_are_kept():
    model = _randomize(NoConfig(layers.ReLU()))
    fused = convert(model, verbose=0)
    assert type(fused) is NoConfig
    assert _folds(fused) == ["relu"]
    _assert_same(fused, model)


def test_attributes_and_layers_that_are_set_from_outside_are_kept():
    x = keras.Input((4, 4, 3))
    y = Norm(name="norm")(x)
    model = keras.Model(x, layers.ReLU()(Norm()(layers.ReLU()(y))))
    model.note, model.extra = {"a": [1, 2]}, layers.Dense(2, name="extra")
    model.extra.build((None, 3))
    model.unknown = re.compile("a")
    model.aux = layers.Dense(2, name="aux")(y)  # leads to no output
    fused = convert(model, verbose=0)
    assert _folds(fused) == ["relu"]  # the other, because aux reads it
    assert fused.note == {"a": [1, 2]}
    assert fused.unknown is model.unknown
    assert fused.extra is not model.extra
    np.testing.assert_array_equal(fused.extra.kernel, model.extra.kernel)
    got, want = (keras.Model(each.input, each.aux)(_images()) for each in (fused, model))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert len(fused.variables) == len(model.variables)


class WithVariables(keras.Model):
    def __init__(self, **kwargs):
        x = keras.Input((3,))
        super().__init__(x, layers.Dropout(0.5, seed=1)(Norm()(x)), **kwargs)
        self.scale_of_loss = self.add_weight(shape=(2,), initializer="ones", name="scale_of_loss", regularizer="l2")
        self.noise = keras.random.SeedGenerator(3)
        self.noise.next()


def test_variables_and_seeds_of_a_functional_class_are_kept():
    model = WithVariables()
    model.scale_of_loss.assign([2.0, 3.0])
    fused = convert(model, verbose=0)
    np.testing.assert_array_equal(fused.scale_of_loss, [2.0, 3.0])
    assert fused.scale_of_loss is not model.scale_of_loss
    assert fused.scale_of_loss.path == model.scale_of_loss.path
    assert [variable.path for variable in fused.weights] == [variable.path for variable in model.weights]
    np.testing.assert_allclose(sum(fused.losses), sum(model.losses))
    np.testing.assert_array_equal(fused.noise.next(), model.noise.next())
    np.testing.assert_array_equal(fused.noise.next(), model.noise.next())


@keras.saving.register_keras_serializable(package="test")
class Overridden(keras.Model):
    """Computes something else than its graph says."""

    def __init__(self, factor=2.0, **kwargs):
        x = keras.Input((4, 4, 3))
        super().__init__(x, layers.ReLU()(Norm()(x)), **kwargs)
        self.factor = factor

    def call(self, inputs, training=None, mask=None):
        return self.factor * super().call(inputs, training=training, mask=mask)

    def get_config(self):
        return {"factor": self.factor}


def test_classes_that_override_call_go_by_their_config():
    model = _randomize(Overridden(3.0))
    fused = convert(model, verbose=0)
    assert (type(fused), fused.factor) == (Overridden, 3.0)
    assert [type(layer) for layer in fused.layers if isinstance(layer, Norm)] == [tfops.keras.BatchNormalization]
    _assert_same(fused, model)


class Forgetful(keras.Model):
    """Whose config leaves out what is no plain value, which would come along."""

    def __init__(self, power=1.0):
        super().__init__()
        self.norm, self.power = Norm(), np.float32([power])

    def call(self, x):
        return keras.ops.abs(self.norm(x)) ** self.power

    def get_config(self):
        return {}


def test_copies_that_compute_something_else_are_refused():
    model = Forgetful(3.0)
    model(_images())
    model.norm.moving_mean.assign([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"cannot convert forgetful\w* \(Forgetful\): on random inputs its copy"):
        convert(model)
    model.power = np.float32([1])
    _assert_same(convert(model, verbose=0), model)


def test_the_check_leaves_no_trace():
    x = keras.Input((3,))
    model = keras.Model(x, layers.Dropout(0.5, seed=1)(Norm()(x)))

    class Counting(layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, dtype="int32", name="count")
            self.seed = keras.random.SeedGenerator(5)

        def call(self, x):
            self.count.assign_add(1)
            return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)

    model = keras.Sequential([x, Norm(), Counting(), layers.Dense(2)])
    with keras.saving.custom_object_scope({"Counting": Counting}):
        model(_images(2, 3))
        before = [variable.numpy() for variable in model.variables]
        fused = convert(model, verbose=0)
    for each in (fused, model):
        for got, want in zip(each.variables, before, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("inputs", ["int32", "bool", "string", "dictionary", "sequence"])
def test_models_of_other_inputs_are_checked_as_far_as_they_can_be(inputs):
    if inputs == "int32":
        x = keras.Input((None,), dtype="int32")
        y = layers.Embedding(2, 3)(x)
    elif inputs == "bool":
        x = keras.Input((3,), dtype="bool")
        y = keras.ops.cast(x, "float32")
    elif inputs == "string":
        x = keras.Input((), dtype="string")
        y = layers.Embedding(3, 3)(layers.StringLookup(vocabulary=["a", "b"])(x))
    elif inputs == "dictionary":
        x = {"b": keras.Input((3,), name="b"), "a": keras.Input((3,), name="a")}
        y = layers.Subtract()([x["b"], x["a"]])
    else:
        x = keras.Input((None, 3))
        y = layers.LSTM(3)(layers.Masking()(x))
    fused = convert(keras.Model(x, layers.ReLU()(Norm()(y))), verbose=0)
    assert _folds(fused) == ["relu"]


def _ones(shape, dtype=None):
    return tf.ones(shape, dtype)


def test_plain_functions_as_settings_are_kept():
    factor = 2.0
    x = keras.Input((3,))
    y = layers.Dense(3, kernel_initializer=_ones, bias_initializer=lambda shape, dtype=None: tf.zeros(shape, dtype))(x)
    y = layers.ReLU()(Norm(gamma_initializer=_ones, name="norm")(y))
    model = keras.Model(x, layers.Activation(lambda x: x - factor, name="minus")(y))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fused = convert(model, verbose=0)
    assert fused.get_layer("norm").gamma_initializer is _ones
    assert fused.get_layer("minus").activation is model.get_layer("minus").activation
    _assert_same(fused, model, _images(5, 3))


def test_plain_functions_that_cannot_be_copied_are_named():
    def mine(x):
        return 2.0 * x

    x = keras.Input((2, 3))
    model = keras.Model(x, layers.TimeDistributed(layers.Dense(3, activation=mine), name="wrapper")(x))
    message = r"wrapper \(TimeDistributed\): it cannot be copied .* plain functions \(activation=mine\)"
    with pytest.raises(ValueError, match=message) as caught:
        convert(model)
    assert len(str(caught.value)) < 600


def test_plain_functions_as_regularizers_are_kept():
    def penalty(w):
        return 3.0 * tf.reduce_sum(w)

    x = keras.Input((3,))
    try:
        y = layers.Dense(2, bias_regularizer=penalty)(Norm(gamma_regularizer=penalty, name="norm")(x))
    except ValueError:
        pytest.skip("older Keras takes no functions as regularizers")
    model = keras.Model(x, y)
    fused = convert(model, verbose=0)
    assert fused.get_layer("norm").gamma_regularizer is penalty
    np.testing.assert_allclose(sum(fused.losses), 9.0)


class NeedsAnObject(layers.Layer):
    def __init__(self, array):
        super().__init__()
        self.array = array

    def call(self, x):
        return x + self.array

    def get_config(self):
        return {**super().get_config(), "array": np.arange(100000.0), "wrong": 1}


def test_refusals_are_short_and_name_model_layer_and_remedy():
    x = keras.Input((3,))
    model = keras.Model(x, NeedsAnObject(np.ones(3, "f"))(Norm()(x)), name="net")
    message = r"cannot convert net \(Functional\): needs_an_object\w* \(NeedsAnObject\): it cannot be copied"
    with pytest.raises(ValueError, match=message) as caught:
        convert(model)
    text = str(caught.value)
    assert len(text) < 500
    assert "array(" not in text
    assert "\n" not in text


def test_the_strategy_of_the_model_is_the_copys():
    code = tf.distribute.MirroredStrategy(["CPU:0"])
    with code.scope():
        x = keras.Input((3,))
        model = keras.Model(x, layers.ReLU()(Norm()(x)))
    plain = keras.Model(x := keras.Input((3,)), Norm()(x))
    assert convert(model, verbose=0).distribute_strategy is code
    assert convert(convert(model, verbose=0), to="keras", verbose=0).distribute_strategy is code
    assert convert(plain, verbose=0)._distribute_strategy is None


def test_copier_maps_each_variable_to_its_copy():
    from tfops.keras._copying import Copier

    model = WithVariables()
    copier = Copier(model, tfops.keras.BatchNormalization, True)
    fused, _ = copier.run()
    assert [id(copier.variables[id(variable)]) for variable in model.variables] == [id(v) for v in fused.variables]
    assert len({id(variable) for variable in copier.variables.values()}) == len(model.variables)


@needs_keras("3.6", "a layer with autocast=False casts nothing")
@pytest.mark.parametrize("wrapped", [False, True])
def test_settings_that_no_config_holds_are_kept(wrapped):
    """In 16 bits, what is cast before it is normalized is infinite."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        x = keras.Input((2, 4))
        unit = layers.UnitNormalization(autocast=False, name="unit")
        first = layers.ReLU()(Norm(autocast=False, name="first")(x))
        other = Norm()(layers.TimeDistributed(unit, autocast=False)(x) if wrapped else unit(x))
        model = keras.Model(x, [first, other])
    finally:
        keras.config.set_dtype_policy("float32")
    model.get_layer("first").moving_mean.assign([1e5] * 4)
    model.get_layer("first").supports_masking = False
    images = tf.constant(3e5, shape=(3, 2, 4)) * [[[0.333334]], [[1.0]], [[0.5]]]
    fused = convert(model, verbose=0)
    assert _folds(fused) == ["relu"]
    for each in (fused, convert(fused, to="keras", verbose=0)):
        assert not each.get_layer("first").supports_masking
        for got, want in zip(each(images), model(images), strict=True):
            assert np.isfinite(want[0]).all()
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_supports_jit_is_kept_or_that_of_the_new_class():
    x = keras.Input((3,))
    model = keras.Model(x, layers.Dense(2, name="dense")(Norm(name="norm")(x)))
    model.get_layer("dense").supports_jit = False
    fused = convert(model, verbose=0)
    assert not fused.get_layer("dense").supports_jit
    assert fused.get_layer("norm").supports_jit == tfops.keras.BatchNormalization().supports_jit
