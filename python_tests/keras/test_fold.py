"""`fold` puts batch norms into the weights beside them where that is the same, and keeps the others; it says which."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import tfops
from tfops.keras import convert, fold
from tfops_testing.folded_models import NO_LAYER, assert_same, check_fold, numbers, randomize

pytestmark = pytest.mark.usefixtures("float64")

Norm = layers.BatchNormalization
Fused = tfops.keras.BatchNormalization


BEFORE = [
    (layers.Dense, {"units": 4}, (5,)),
    (layers.Dense, {"units": 4}, (3, 2, 5)),
    (layers.Conv1D, {"filters": 4, "kernel_size": 3, "padding": "causal"}, (7, 5)),
    (layers.Conv2D, {"filters": 6, "kernel_size": 3, "padding": "same", "strides": 2}, (5, 6, 4)),
    (layers.Conv2D, {"filters": 6, "kernel_size": (2, 3), "groups": 2, "dilation_rate": 2}, (7, 9, 4)),
    (layers.Conv3D, {"filters": 3, "kernel_size": 2}, (3, 4, 5, 2)),
    (layers.DepthwiseConv1D, {"kernel_size": 3, "depth_multiplier": 3}, (7, 5)),
    (layers.DepthwiseConv2D, {"kernel_size": 3, "depth_multiplier": 2, "padding": "same"}, (5, 6, 3)),
    (layers.SeparableConv1D, {"filters": 4, "kernel_size": 3, "depth_multiplier": 2}, (7, 5)),
    (layers.SeparableConv2D, {"filters": 4, "kernel_size": 3, "padding": "same"}, (5, 6, 3)),
    (layers.Conv1DTranspose, {"filters": 4, "kernel_size": 3, "strides": 2}, (7, 5)),
    (layers.Conv2DTranspose, {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same"}, (4, 5, 3)),
    (layers.Conv3DTranspose, {"filters": 3, "kernel_size": 2}, (3, 4, 5, 2)),
]
NORMS = [{}, {"scale": False}, {"center": False}, {"center": False, "scale": False, "epsilon": 0.1}]


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("kind", "options", "shape"), BEFORE, ids=lambda value: getattr(value, "__name__", None))
def test_what_follows_goes_into_the_layer(kind, options, shape, use_bias, capsys):
    for settings in NORMS if kind is layers.Conv3D else NORMS[:1]:
        inputs = keras.Input(shape)
        y = layers.ReLU()(Norm(name="norm", **settings)(kind(name="layer", use_bias=use_bias, **options)(inputs)))
        folded, told = check_fold(keras.Model(inputs, y), numbers(2, *shape), capsys)
        assert told == {"norm": "folded into layer"}
        assert folded.get_layer("layer").use_bias
        assert [type(layer) for layer in folded.layers[2:]] == [layers.Identity, layers.ReLU]


AFTER = [
    (layers.Dense, {"units": 4, "activation": "tanh"}, (5,)),
    (layers.Dense, {"units": 4}, (3, 5)),
    (layers.Conv1D, {"filters": 4, "kernel_size": 3}, (7, 5)),
    (layers.Conv2D, {"filters": 6, "kernel_size": (2, 3), "groups": 2, "activation": "relu"}, (7, 9, 4)),
    (layers.Conv2D, {"filters": 6, "kernel_size": 1, "padding": "same", "strides": 2}, (5, 6, 4)),
    (layers.Conv3D, {"filters": 3, "kernel_size": 2}, (3, 4, 5, 2)),
    (layers.DepthwiseConv1D, {"kernel_size": 3, "depth_multiplier": 3}, (7, 5)),
    (layers.DepthwiseConv2D, {"kernel_size": 3, "depth_multiplier": 2}, (5, 6, 3)),
    (layers.SeparableConv1D, {"filters": 4, "kernel_size": 3, "depth_multiplier": 2}, (7, 5)),
    (layers.SeparableConv2D, {"filters": 4, "kernel_size": (3, 2)}, (5, 6, 3)),
]


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(("kind", "options", "shape"), AFTER, ids=lambda value: getattr(value, "__name__", None))
def test_what_comes_before_goes_into_the_layer_that_does_not_pad(kind, options, shape, use_bias, capsys):
    inputs = keras.Input(shape)
    y = Norm(name="before")(layers.ReLU()(inputs))
    y = kind(name="layer", use_bias=use_bias, **options)(y)
    y = y if options.get("activation") else Norm(name="after")(y)  # both at once
    _, told = check_fold(keras.Model(inputs, y), numbers(2, *shape), capsys)
    assert set(told.values()) == {"folded into layer"}


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("kind", [layers.Conv2D, layers.SeparableConv2D, layers.DepthwiseConv2D])
def test_channels_first(kind, follows, capsys):
    options = {"kernel_size": 2} if kind is layers.DepthwiseConv2D else {"kernel_size": 2, "filters": 4}
    inputs = keras.Input((3, 5, 6))
    layer, norm = kind(data_format="channels_first", name="layer", **options), Norm(axis=1, name="norm")
    y = norm(layer(inputs)) if follows else layer(norm(inputs))
    model = keras.Model(inputs, y)
    randomize(model)
    folded = fold(model, verbose=2)
    assert "norm  folded into layer" in capsys.readouterr().out
    last = {"data_format": "channels_last", "name": "layer", **options}  # on a CPU nothing else runs
    inputs = keras.Input((5, 6, 3))
    layer, norm = kind(**last), Norm(name="norm")
    stock = keras.Model(inputs, norm(layer(inputs)) if follows else layer(norm(inputs)))
    served = keras.Sequential([keras.Input((5, 6, 3)), kind(**last)])
    for each in stock.layers[1:]:
        each.set_weights(model.get_layer(each.name).get_weights())
    served.set_weights(folded.get_layer("layer").get_weights())
    x = numbers(2, 5, 6, 3)
    assert_same(served(x), stock(x))


def _block():
    """An activation, and a residual with and without one, behind tfops' layer; and a batch norm that is kept."""
    inputs = keras.Input((4, 5, 3))
    x = Fused(name="first", activation="leaky_relu")(layers.Conv2D(3, 3, padding="same", name="one")(inputs))
    y = Fused(name="second", activation="silu")(layers.Conv2D(3, 1, use_bias=False, name="two")(x), residual=x)
    z = Fused(name="third")(layers.Conv2D(3, 1, name="three")(y), residual=y)
    return keras.Model(inputs, layers.Flatten()(layers.ReLU(name="relu")(Fused(name="kept")(z))), name="block")


def test_fused_activations_and_residuals_stay(capsys):
    folded, told = check_fold(_block(), numbers(2, 4, 5, 3), capsys)
    into = {"first": "one", "second": "two", "third": "three"}
    assert told.pop("kept") == f"{NO_LAYER} (third (BatchNormalization)); ReLU: relu"
    assert told == {name: f"folded into {layer}" for name, layer in into.items()}
    assert folded.get_layer("one").activation is keras.activations.leaky_relu
    assert folded.get_layer("two").activation is keras.activations.linear
    names = [layer.name for layer in folded.layers if isinstance(layer, (layers.Add, layers.Activation))]
    assert names == ["second_add", "second_silu", "third_add"]


def test_the_line_counts(capsys):
    fold(_block())
    assert capsys.readouterr().out == (
        "block: 4 batch norms: 3 folded into weights, 1 kept (its input does not come from a convolution or dense "
        "layer): 1 with ReLU\n"
    )
    inputs = keras.Input((3,))
    fold(keras.Model(inputs, layers.ReLU()(inputs), name="none"))
    assert capsys.readouterr().out == "none: there are no batch norms to fold\n"
    fold(_block(), verbose=0)
    assert capsys.readouterr().out == ""


def test_converted_models_fold_like_the_model(capsys):
    inputs = keras.Input((6, 6, 3))
    x = layers.ReLU()(Norm(name="stem")(layers.Conv2D(4, 3, name="conv")(inputs)))
    y = Norm(name="main")(layers.Conv2D(4, 1, name="conv_main")(x))
    x = layers.ReLU(name="out")(layers.Add(name="add")([Norm(name="shortcut")(x), y]))
    model = keras.Model(inputs, layers.Dense(2)(x))
    folded, told = check_fold(model, numbers(2, 6, 6, 3), capsys)
    assert told.pop("shortcut").endswith("; addition and ReLU: add, out")
    assert set(told.values()) == {"folded into conv", "folded into conv_main"}
    again, told_again = check_fold(convert(model, verbose=0), numbers(2, 6, 6, 3), capsys)
    assert told_again.keys() - {"shortcut"} == told.keys()
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in folded.layers]
    for got, want in zip(again.get_weights(), folded.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)
    # A folded model has no more to fold.
    again, told_again = check_fold(folded, numbers(2, 6, 6, 3), capsys)
    assert told_again.keys() == {"shortcut"}
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in folded.layers]


class Own(keras.Model):
    """Has its layers as attributes, too."""

    def __init__(self, **kwargs):
        inputs = keras.Input((6,))
        dense, norm = layers.Dense(4, name="dense"), Norm(name="norm")
        super().__init__(inputs, layers.Dense(2)(norm(dense(inputs))), **kwargs)
        self.dense, self.norm, self.features = dense, norm, norm.output

    def embed(self, x):
        return self.norm(self.dense(x))


def test_models_keep_their_class_and_attributes(capsys):
    model = Own()
    randomize(model)
    folded, told = check_fold(model, numbers(2, 6), capsys)
    assert told == {"norm": "folded into dense"}
    assert type(folded) is Own
    assert_same(folded.embed(numbers(2, 6)), model.embed(numbers(2, 6)))
    assert_same(*(keras.Model(each.inputs, each.features)(numbers(2, 6)) for each in (folded, model)))


def test_nested_and_shared_models(capsys):
    stack = [keras.Input((4, 4, 3)), layers.Conv2D(4, 3, name="conv"), Norm(name="norm"), layers.ReLU()]
    inner = keras.Sequential(stack, name="inner")
    inputs = [keras.Input((4, 4, 3)), keras.Input((4, 4, 3))]
    y = layers.Concatenate()([layers.Flatten()(inner(x)) for x in inputs])
    _, told = check_fold(
        keras.Model(inputs, layers.Dense(2)(y)), [numbers(2, 4, 4, 3), numbers(2, 4, 4, 3) + 1], capsys
    )
    assert told == {"norm": "folded into conv"}


def test_sequential_models(capsys):
    stack = [
        keras.Input((6, 6, 3)),
        Norm(name="first"),
        layers.Conv2D(4, 3, use_bias=False, name="conv"),
        Fused(name="second", activation="relu6"),
        layers.GlobalAveragePooling2D(),
        Norm(name="third"),
        layers.Dropout(0.5),
        Norm(name="fourth"),
        layers.Dense(2, name="dense"),
    ]
    folded, told = check_fold(keras.Sequential(stack), numbers(2, 6, 6, 3), capsys)
    assert told.pop("third").startswith(NO_LAYER)
    assert told == {"first": "folded into conv", "second": "folded into conv", "fourth": "folded into dense"}
    assert folded.get_layer("conv").activation is keras.activations.relu6


def test_the_copy_is_for_inference(capsys):
    inputs = keras.Input((6,))
    limit = keras.constraints.MaxNorm(1)
    options = {"kernel_regularizer": "l2", "bias_constraint": "non_neg", "kernel_constraint": limit}
    y = Norm(name="norm")(layers.Dense(4, name="dense", **options)(inputs))
    y = Norm(name="kept", momentum=0.5)(layers.ReLU()(y))
    model = keras.Model(inputs, layers.Dense(2, kernel_regularizer="l2", activation="tanh")(layers.ReLU()(y)))
    model.compile("sgd", "mse")
    folded, _ = check_fold(model, numbers(8, 6), capsys)
    assert not folded.compiled
    assert folded.trainable_variables == []
    dense = folded.get_layer("dense")
    assert dense.kernel_regularizer is dense.kernel_constraint is dense.bias_constraint is None
    assert dense.kernel.regularizer is dense.kernel.constraint is None
    assert_same(folded(numbers(8, 6), training=True), model(numbers(8, 6)))
    folded.compile(loss="mse")
    y = numbers(8, 2)
    want = np.mean((np.asarray(model(numbers(8, 6))) - y) ** 2)
    assert folded.evaluate(numbers(8, 6), y, verbose=0) == pytest.approx(want)
    assert model.trainable_variables
    assert model.compiled


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float16"])
def test_dtypes(policy, capsys):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((6, 6, 3), dtype="float32")
    x = Norm(name="norm", dtype="float32")(layers.Conv2D(8, 3, name="conv")(inputs))
    model = keras.Model(inputs, layers.Dense(4)(Norm(name="other")(layers.Dense(4, name="hidden")(layers.ReLU()(x)))))
    tolerance = {"float32": 1e-6, "mixed_bfloat16": 2e-2}.get(policy, 4e-3)
    folded, told = check_fold(model, numbers(2, 6, 6, 3), capsys, tolerance)
    assert told == {"norm": "folded into conv", "other": "folded into hidden"}
    assert [layer.dtype_policy.name for layer in folded.layers] == [layer.dtype_policy.name for layer in model.layers]
    assert folded(numbers(1, 6, 6, 3)).dtype == model(numbers(1, 6, 6, 3)).dtype
    # Rounded once, from float64.
    kernel, norm = np.asarray(model.get_layer("conv").kernel, np.float64), model.get_layer("norm")
    gamma, variance = (np.asarray(each, np.float64) for each in (norm.gamma, norm.moving_variance))
    want = (kernel * (gamma / np.sqrt(variance + norm.epsilon))).astype(folded.get_layer("conv").variable_dtype)
    np.testing.assert_array_equal(folded.get_layer("conv").kernel, want)


def test_saving(tmp_path, capsys):
    inputs = keras.Input((6, 6, 3))
    x = layers.ReLU()(Norm()(layers.Conv2D(4, 3, use_bias=False)(inputs)))
    folded, _ = check_fold(keras.Model(inputs, x), numbers(2, 6, 6, 3), capsys)
    folded.save(tmp_path / "model.keras")
    assert "tfops" not in folded.to_json()
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(numbers(2, 6, 6, 3)), folded(numbers(2, 6, 6, 3)))
    assert loaded.trainable_variables == []
    (tmp_path / "two").mkdir()
    folded.save_weights(tmp_path / "two" / "m.weights.h5")
    loaded.load_weights(tmp_path / "two" / "m.weights.h5")


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"model must be a keras\.Model, but it is <Dense"):
        fold(layers.Dense(2))
    with pytest.raises(ValueError, match="verbose must be 0, 1 or 2, but it is 3"):
        fold(_block(), verbose=3)


class NoConfig(keras.Model):
    def __init__(self, units):
        super().__init__()
        self.dense = layers.Dense(units)

    def call(self, x):
        return self.dense(x)


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(ValueError, match=r"cannot fold no_config\w* \(NoConfig\): it cannot be copied"):
        fold(NoConfig(2))
