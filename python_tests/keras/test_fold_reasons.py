"""What `fold` keeps, and why: it says so of each batch norm."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import tfops
from tfops.keras import fold
from tfops_testing.folded_models import NO_LAYER, TOLERANCE, assert_same, check_fold, norms, numbers, randomize

pytestmark = pytest.mark.usefixtures("float64")

Norm = layers.BatchNormalization
Fused = tfops.keras.BatchNormalization


class Derived(Norm):
    pass


class Hidden(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.norm = layers.Dense(4), Norm(name="norm")

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((*shape[:-1], 4))

    def call(self, x):
        return self.norm(self.dense(x))


def _with_activation(x):
    return Norm(name="norm")(layers.Dense(4, activation="relu", name="layer")(x))


def _read_elsewhere(x):
    y = layers.Dense(4, name="layer")(x)
    return layers.Add()([Norm(name="norm")(y), y])


def _read_as_residual(x):
    y = layers.Dense(4, name="layer")(x)
    return Fused(name="norm")(y, residual=y)


def _output(x):
    y = layers.Dense(4, name="layer")(x)
    return y, Norm(name="norm")(y)


def _other_axis(x):
    return Norm(name="norm", axis=1)(layers.Conv2D(3, 1, name="layer")(x))


def _shared_layer(x):
    layer = layers.Dense(3, name="layer")
    return layer(Norm(name="norm")(layer(x)))


def _shared_norm(x):
    norm, dense = Norm(name="norm"), layers.Dense(3)
    return norm(layers.Dense(3)(norm(dense(x))))


def _in_training(x):
    return Norm(name="norm")(layers.Dense(4)(x), training=True)


def _nested_in_training(x):
    inner = keras.Sequential([keras.Input(x.shape[1:]), layers.Dense(4), Norm(name="norm")])
    return inner(x, training=True)


def _nested_layer(x):
    inner = keras.Sequential([keras.Input(x.shape[1:]), layers.Dense(4)], name="inner")
    return Norm(name="norm")(inner(x))


def _pooled(x):
    return Norm(name="norm")(layers.GlobalAveragePooling2D(name="pool")(x))


def _padding(x):
    return layers.Conv2D(3, 3, padding="same", name="layer")(Norm(name="norm")(x))


def _zero_padding(x):
    y = layers.ZeroPadding2D(name="pad")(Norm(name="norm")(layers.ReLU(name="relu")(x)))
    return layers.Conv2D(3, 3)(y)


def _transposed_after(x):
    return layers.Conv2DTranspose(3, 1, name="layer")(Norm(name="norm")(layers.ReLU()(x)))


def _regularized_norm(x):
    return Norm(name="norm", activity_regularizer="l2")(layers.Dense(3)(x))


def _regularized_layer(x):
    return Norm(name="norm")(layers.Dense(3, name="layer", activity_regularizer="l2")(x))


def _rounded(x):
    return Norm(name="norm")(keras.ops.cast(layers.Dense(4)(x), "int32"))


def _derived(x):
    return Derived(name="norm")(layers.Dense(3)(x))


IT = "the layer that would take it in"
KEPT = [
    (_with_activation, "kept: the layer before it has an activation (layer (Dense))"),
    (_read_elsewhere, "kept: the output of the layer before it is read elsewhere, too (layer (Dense)); addition: add"),
    (_read_as_residual, "kept: the output of the layer before it is read elsewhere, too (layer (Dense))"),
    (_output, "kept: the output of the layer before it is read elsewhere, too (layer (Dense))"),
    (_other_axis, f"kept: its axis is not that of the channels of {IT} (layer (Conv2D))"),
    (_shared_layer, f"kept: {IT} is called several times (layer (Dense))"),
    (_shared_norm, "kept: it is called several times"),
    (_in_training, "kept: it is called with training=True"),
    (_nested_in_training, "kept: it is called with training=True"),
    (_nested_layer, f"{NO_LAYER} (inner (Sequential))"),
    (_pooled, f"{NO_LAYER} (pool (GlobalAveragePooling2D))"),
    (_padding, "kept: the layer after it pads what it reads (layer (Conv2D))"),
    (_zero_padding, f"{NO_LAYER} (relu (ReLU))"),
    (_transposed_after, "kept: the layer after it pads what it reads (layer (Conv2DTranspose))"),
    (_regularized_norm, "kept: it has an activity regularizer"),
    (_regularized_layer, f"kept: {IT} has an activity regularizer (layer (Dense))"),
    (_rounded, f"{NO_LAYER} (cast (Cast))"),
    (_derived, "kept: its class derives from Keras' (Derived)"),
    (lambda x: Hidden(name="hidden")(x), "kept: in a model or layer whose graph cannot be seen"),
    (lambda x: layers.TimeDistributed(Norm(name="norm"))(x), "kept: in a model or layer whose graph cannot be seen"),
]


@pytest.mark.parametrize(("build", "reason"), KEPT, ids=lambda value: getattr(value, "__name__", ""))
def test_others_are_kept(build, reason, capsys):
    inputs = keras.Input((4, 5, 3), name="inputs")
    keras.utils.clear_session()
    tolerance = 1e-6 if build is _rounded else TOLERANCE  # Keras computes in float32 there
    folded, told = check_fold(keras.Model(inputs, build(inputs)), numbers(2, 4, 5, 3), capsys, tolerance)
    assert told["norm"].replace("cast_1", "cast") == reason  # older Keras has one more in the graph
    assert type(norms(folded)["norm"]) is (Derived if build is _derived else Fused)


def test_quantized_layers_are_left_alone(capsys):
    keras.config.set_dtype_policy("float32")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="layer"), Norm(name="norm")])
    model.layers[0].quantize("int8")
    _, told = check_fold(model, numbers(2, 4), capsys, 1e-6)
    assert told == {"norm": f"kept: {IT} is quantized (layer (Dense))"}


def test_adapters_go_into_the_weights_too(capsys):
    layer = layers.Dense(3, name="layer", use_bias=False)
    model = keras.Sequential([keras.Input((4,)), layer, Norm(name="norm")])
    layer.enable_lora(2)
    folded, told = check_fold(model, numbers(2, 4), capsys, 1e-7)  # LoRA weights are float32
    assert told == {"norm": "folded into layer"}
    assert [weight.name for weight in folded.weights] == ["kernel", "bias"]


def test_weights_have_to_be_finite(capsys):
    layer = layers.Dense(3, name="layer", dtype="mixed_float16")
    model = keras.Sequential([keras.Input((4,)), layer, Norm(name="norm", epsilon=1e-12)])
    randomize(model)
    model.get_layer("norm").moving_variance.assign([1, 1e-12, 1])
    layer.kernel.assign(np.full((4, 3), 1.0))
    fold(model, verbose=2)
    assert "norm  kept: its weights would not be finite in float16 (layer (Dense))" in capsys.readouterr().out


def test_models_without_weights_keep_all(capsys):
    fold(keras.Sequential([layers.Dense(3), Norm(name="norm")], name="net"), verbose=2)
    assert capsys.readouterr().out.splitlines()[1] == "  norm  kept: it has no weights yet"


@pytest.mark.parametrize("build", [_in_training, _nested_in_training])
def test_batch_norms_that_always_train_still_do(build, capsys):
    x = numbers(8, 4, 5, 3)
    inputs = keras.Input((4, 5, 3))
    model = keras.Model(inputs, build(Norm(name="other")(layers.Dense(4)(inputs))))
    folded, told = check_fold(model, x, capsys)
    assert told["other"].startswith("folded")
    assert folded.trainable_variables == []
    for _ in range(2):  # unless Keras is told otherwise, although all else is frozen
        assert_same(folded(x), model(x))
    assert_same(*(norms(each)["norm"].moving_mean for each in (folded, model)))
    model.trainable = False
    _, told = check_fold(model, x, capsys)
    assert told["norm"].startswith("folded")
