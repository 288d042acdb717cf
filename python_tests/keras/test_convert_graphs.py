"""What `convert` folds and what it does not, in every kind of model; and what it keeps."""

from __future__ import annotations

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfops
from tfops.keras import convert

Norm = layers.BatchNormalization
TOLERANCE = 2e-5  # of the largest element of a tensor, in float32


def _train(model, x, steps=3, seed=1):
    """The outputs and weights, by path, of some steps of SGD on random targets, and of inference after it."""
    keras.utils.set_random_seed(seed)
    if not model.built:
        model(x)
    optimizer = keras.optimizers.SGD(0.1)
    results = {}
    for step in range(steps):
        with tf.GradientTape() as tape:
            outputs = keras.tree.flatten(model(x, training=True))
            loss = sum(tf.reduce_mean(tf.square(tf.cast(y, tf.float32) - step)) for y in outputs) + sum(model.losses)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        results.update({f"{step} {i}": y.numpy() for i, y in enumerate(outputs)})
    results.update({f"inference {i}": y.numpy() for i, y in enumerate(keras.tree.flatten(model(x, training=False)))})
    results.update({weight.path: weight.numpy() for weight in model.weights})
    return results


def _assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(got[name], value, rtol=0, atol=TOLERANCE * (scale + 0.1), err_msg=name)


def _folded(layer):
    """What is folded into the calls of a batch norm: "add", an activation, "add+" and one; "" where nothing."""
    calls = [node.arguments.kwargs.get("folded") or layer.folded or "" for node in layer._inbound_nodes]
    return " ".join(dict.fromkeys(calls)).strip() if calls else layer.folded or ""


def _calls(model, name):
    """What is folded into each of a batch norm's calls in a graph."""
    return [node.arguments.kwargs.get("folded") for node in model.get_layer(name)._inbound_nodes]


def _config(model):
    """In which lists and tuples are the same; without the shapes that layers were first built for."""
    config = json.dumps(model.get_config(), sort_keys=True, default=str)
    return re.sub(r'"build_config": \{[^{}]*\}', "", config)


def _names(model):
    return [layer.name for layer in model._flatten_layers() if not isinstance(layer, layers.InputLayer)]


def _check(model, x, folds, **kwargs):
    """Converts the model, and back; returns the converted one. `folds` is what is folded into each batch norm."""
    if not model.built:
        model(x)
    fixed = [
        id(w) for layer in model._flatten_layers() if isinstance(layer, layers.Normalization) for w in layer.weights
    ]
    for weight in [weight for weight in model.weights if id(weight) not in fixed]:  # none is 0 or 1
        weight.assign(weight + tf.random.stateless_uniform(weight.shape, (0, 1), 0.1, 0.5, dtype=weight.dtype))
    before = model.get_weights()
    fused = convert(model, verbose=0, **kwargs)
    back = convert(fused, to="keras", verbose=0)
    flat = [layer for layer in fused._flatten_layers() if isinstance(layer, Norm)]
    assert {type(layer) for layer in flat} == {tfops.keras.BatchNormalization}
    assert {type(layer) for layer in back._flatten_layers() if isinstance(layer, Norm)} == {Norm}
    assert {layer.name: _folded(layer) for layer in flat} == folds
    # The layers are the same, with the same names; on the way back with the same classes and settings.
    for each in (fused, back):
        assert _names(each) == _names(model)
        assert [weight.path for weight in each.weights] == [weight.path for weight in model.weights]
    stock = {tfops.keras.BatchNormalization: Norm}
    assert [type(each) for each in back.layers] == [stock.get(type(each), type(each)) for each in model.layers]
    if not kwargs and not any(isinstance(each, tfops.keras.BatchNormalization) for each in model._flatten_layers()):
        assert _config(back) == _config(model)
    for got, want in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, want)
    results = [_train(each, x) for each in (fused, back, model)]
    _assert_same(results[0], results[2])
    _assert_same(results[1], results[2])
    return fused


def _images(*shape):
    return tf.random.stateless_normal(shape or (6, 4, 4, 3), (0, 0))


@pytest.mark.parametrize(
    ("make", "activation"),
    [
        (lambda: layers.ReLU(), "relu"),
        (lambda: layers.ReLU(6), "relu6"),
        (lambda: layers.ReLU(negative_slope=0.2), "leaky_relu"),
        (lambda: layers.LeakyReLU(0.2), "leaky_relu"),
        (lambda: layers.Activation("relu"), "relu"),
        (lambda: layers.Activation("relu6"), "relu6"),
        (lambda: layers.Activation("leaky_relu"), "leaky_relu"),
        (lambda: layers.Activation("swish"), "silu"),
        (lambda: layers.Activation(tf.nn.relu), "relu"),
        (lambda: keras.activations.relu, "relu"),
        (lambda: keras.ops.relu6, "relu6"),
        (lambda: keras.ops.silu, "silu"),
        (lambda: keras.ops.leaky_relu, "leaky_relu"),
        (lambda: layers.ReLU(threshold=0.1), "relu(threshold=0.1)"),
        (lambda: layers.ReLU(5), "relu(max_value=5.0)"),
        (lambda: layers.ReLU(2, 0.25, 0.5), "relu(max_value=2.0, negative_slope=0.25, threshold=0.5)"),
        (lambda: layers.ReLU(negative_slope=0.1), "leaky_relu(negative_slope=0.1)"),
        (lambda: layers.ReLU(1, threshold=1), ""),
        (lambda: layers.LeakyReLU(), "leaky_relu(negative_slope=0.3)"),
        (lambda: layers.LeakyReLU(0), "relu"),
        (lambda: lambda x: keras.ops.leaky_relu(x, 0.1), "leaky_relu(negative_slope=0.1)"),
        (lambda: lambda x: keras.activations.relu(x, max_value=3), "relu(max_value=3.0)"),
        (lambda: lambda x: keras.ops.elu(x, alpha=0.5), "elu(alpha=0.5)"),
        (lambda: layers.Activation("hard_swish"), "hard_silu"),
        (lambda: layers.Activation("gelu"), "gelu"),
        (lambda: layers.Activation(tf.nn.gelu), "gelu"),
        (lambda: keras.activations.gelu, "gelu"),
        (lambda: keras.ops.gelu, "gelu_tanh"),
        (lambda: layers.ELU(), "elu"),
        (lambda: layers.Activation("selu"), "selu"),
        (lambda: keras.ops.tanh, "tanh"),
        (lambda: layers.Activation("sigmoid"), "sigmoid"),
        (lambda: layers.Activation("softplus"), "softplus"),
        (lambda: layers.Activation("mish"), "mish"),
        (lambda: layers.ELU(0.5), "elu(alpha=0.5)"),
        (lambda: layers.Activation("softsign"), ""),
        (lambda: layers.Activation(lambda x: 2 * x), ""),
        (lambda: layers.ReLU(dtype="float64"), ""),
        (lambda: layers.ReLU(activity_regularizer="l2"), ""),
        (lambda: layers.PReLU(), ""),
    ],
)
def test_activations_are_folded(make, activation):
    inputs = keras.Input((4, 4, 3))
    y = Norm(name="norm")(inputs)
    operation = make()
    outputs = layers.Conv2D(2, 1)(operation(y))
    fused = _check(keras.Model(inputs, outputs), _images(), {"norm": activation})
    assert any(type(each) is type(operation) for each in fused.operations) == (activation == "")


def _add_then(*after, first=True, residual=lambda x: x):
    inputs = keras.Input((4, 4, 3))
    y = [Norm(name="norm")(inputs), residual(inputs)]
    y = layers.Add()(y if first else y[::-1])
    for layer in after:
        y = layer(y)
    return keras.Model(inputs, layers.Conv2D(2, 1)(y))


@pytest.mark.parametrize("first", [True, False])
def test_additions_are_folded(first):
    _check(_add_then(first=first), _images(), {"norm": "add"})
    _check(_add_then(layers.ReLU(), first=first), _images(), {"norm": "add+relu"})
    _check(_add_then(layers.Activation("softsign"), first=first), _images(), {"norm": "add"})
    _check(_add_then(layers.Conv2D(2, 1), layers.ReLU(), first=first), _images(), {"norm": "add"})


def test_additions_that_are_not_folded():
    def add(*tensors):
        model = keras.Model(inputs, layers.Conv2D(2, 1)(layers.ReLU()(layers.Add()(tensors))))
        _check(model, _images(), {"norm": ""})

    inputs = keras.Input((4, 4, 3))
    norm = Norm(name="norm")
    add(norm(inputs), layers.GlobalAveragePooling2D(keepdims=True)(inputs))  # broadcast
    add(norm(inputs), inputs, inputs)
    y = norm(inputs)
    add(y, y)
    add(y, layers.Conv2D(3, 1)(y))  # two readers
    add(Norm(name="norm", dtype="mixed_float16")(inputs), inputs)


def test_operations_are_folded():
    inputs = keras.Input((4, 4, 3))
    y = keras.ops.relu(Norm(name="first")(inputs) + inputs)
    y = keras.ops.relu(1.0 + Norm(name="second")(y))
    _check(keras.Model(inputs, layers.Dense(2)(y)), _images(), {"first": "add+relu", "second": ""})


def test_of_two_added_norms_one_folds_the_addition():
    inputs = keras.Input((4, 4, 3))
    y = [Norm(name="shortcut")(layers.Conv2D(5, 1)(inputs)), Norm(name="main")(layers.Conv2D(5, 1)(inputs))]
    model = keras.Model(inputs, layers.Conv2D(2, 1)(layers.ReLU()(layers.Add()(y))))
    _check(model, _images(), {"shortcut": "", "main": "add+relu"})


def test_outputs_are_kept():
    inputs = keras.Input((4, 4, 3))
    y = Norm(name="output")(inputs)
    z = layers.ReLU(name="head")(Norm(name="before_head")(layers.Conv2D(3, 1)(layers.ReLU()(y))))
    several = keras.Model(inputs, {"a": y, "b": z})
    fused = _check(several, _images(), {"output": "", "before_head": "relu"})
    assert fused.output_names == several.output_names
    assert set(fused(_images())) == {"a", "b"}
    _check(keras.Model(inputs, z), _images(), {"output": "relu", "before_head": "relu"})


def test_fold_false_keeps_everything_else():
    model = _add_then(layers.ReLU())
    fused = _check(model, _images(), {"norm": ""}, fold=False)
    assert [layer.name for layer in fused.layers] == [layer.name for layer in model.layers]
    again = _check(fused, _images(), {"norm": "add+relu"})  # a model of tfops' layers can be folded later
    assert _names(again) == _names(model)


def test_shared_layers_are_folded_call_by_call():
    inputs = keras.Input((4, 4, 3))
    same, other, relu = Norm(name="same"), Norm(name="other"), layers.ReLU()
    y = relu(same(inputs))
    y = relu(same(layers.Conv2D(3, 1)(y)))
    y = relu(other(layers.Conv2D(3, 1)(y)))
    y = other(layers.Conv2D(3, 1)(y))
    fused = _check(keras.Model(inputs, layers.Dense(2)(y)), _images(), {"same": "relu", "other": "relu"})
    assert _calls(fused, "other") == ["relu", None]
    assert len(fused.get_layer("same")._inbound_nodes) == 2


def test_nested_models_are_converted():
    def block(shape, name, **kwargs):
        inputs = keras.Input(shape)
        y = Norm(name=f"{name}_norm")(layers.Conv2D(3, 1, **kwargs)(inputs))
        return keras.Model(inputs, layers.ReLU()(layers.Add()([y, inputs])), name=name)

    inputs = keras.Input((4, 4, 3))
    twice, once = block((4, 4, 3), "twice"), block((None, None, 3), "once")
    sequential = keras.Sequential([layers.Conv2D(3, 1), Norm(name="inner"), layers.ReLU()], name="sequential")
    y = twice(twice(inputs))
    y = Norm(name="outer")(sequential(once(y)))
    model = keras.Model(inputs, layers.Dense(2)(layers.Activation("silu")(y)))
    folds = {"twice_norm": "add+relu", "once_norm": "add+relu", "inner": "relu", "outer": "silu"}
    fused = _check(model, _images(), folds)
    assert len(fused.get_layer("twice")._inbound_nodes) == 2


@pytest.mark.parametrize("built", [True, False])
def test_sequential_models_are_converted(built):
    stack = [
        layers.Conv2D(4, 3, name="conv"),
        Norm(name="first"),
        layers.ReLU(),
        Norm(name="second"),
        layers.Dropout(0.5, seed=3),
        Norm(name="third"),
        layers.Activation("tanh"),
        Norm(name="last"),
    ]
    model = keras.Sequential([keras.Input((4, 4, 3)), *stack] if built else stack)
    if not built:
        fused = convert(model, verbose=0)
        assert not fused.built
        assert fused.layers[1].folded == "relu"
    _check(model, _images(), {"first": "relu", "second": "", "third": "tanh", "last": ""})


@keras.saving.register_keras_serializable(package="test")
class Block(layers.Layer):
    """Keeps batch norms in many ways, without names."""

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.norm = Norm()
        self.norms = [Norm(), {"inner": Norm()}]
        self.by_name = {"a": Norm(), "b": (Norm(), layers.Dense(channels))}
        self.wrapped = layers.TimeDistributed(Norm())

    def build(self, shape):
        self.norm.build(shape)
        self.late = Norm(name="late")
        self.late.build(shape)

    def call(self, x, training=None):
        for norm in (self.norm, self.norms[0], self.norms[1]["inner"], self.by_name["a"], self.by_name["b"][0]):
            x = tf.nn.relu(norm(x, training=training))
        return self.by_name["b"][1](self.late(self.wrapped(x, training=training), training=training))


@keras.saving.register_keras_serializable(package="test")
class Net(keras.Model):
    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.backbone = keras.Sequential([layers.Conv2D(channels, 1), Norm(), layers.ReLU()])
        self.block = Block(channels)
        self.head = layers.Dense(2)

    def call(self, x, training=None):
        return self.head(self.block(self.backbone(x, training=training), training=training))

    def get_config(self):
        return {"channels": self.channels}


def test_layers_in_layers_are_converted():
    inputs = keras.Input((4, 4, 3))
    y = layers.TimeDistributed(Norm(), name="wrapper")(Block(3, name="block")(inputs))
    model = keras.Model(inputs, layers.ReLU()(Norm(name="norm")(y)))
    names = [layer.name for layer in model._flatten_layers() if isinstance(layer, Norm)]
    assert len(names) == 9
    _check(model, _images(), {name: "relu" if name == "norm" else "" for name in names})


def test_subclassed_models_are_converted():
    model = Net(5)
    assert not convert(model, verbose=0).built
    model(_images())
    names = [layer.name for layer in model._flatten_layers() if isinstance(layer, Norm)]
    assert len(names) == 8
    fused = _check(model, _images(), dict.fromkeys(names, ""))
    assert type(fused) is Net
    assert [weight.path for weight in fused.weights] == [weight.path for weight in model.weights]
    assert type(Net(5).block.norm) is Norm  # Keras' class is what it was


class Derived(Norm):
    pass


class WithStep(keras.Model):
    def train_step(self, data):
        return {**super().train_step(data), "mine": 1.0}


class Plain(keras.Model):
    """As most are written: without a config."""

    def __init__(self):
        super().__init__()
        self.stack = [layers.Dense(3), Norm(), layers.Dense(2)]

    def call(self, x):
        for layer in self.stack:
            x = layer(x)
        return x


def test_subclassed_model_without_a_config_is_converted():
    model = Plain()
    model(_images())
    fused = _check(model, _images(), {model.stack[1].name: ""})
    assert type(fused.stack[1]) is tfops.keras.BatchNormalization
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with pytest.raises(ValueError, match="its dtype policy is float32, but that of a copy is mixed_float16"):
            convert(model)
    finally:
        keras.config.set_dtype_policy("float32")


class Converting(keras.Model):
    """Converts a part of itself."""

    def __init__(self):
        super().__init__()
        self.backbone = convert(_add_then(layers.ReLU()), verbose=0)
        self.norm = Norm()

    def call(self, x, training=None):
        return self.norm(self.backbone(x, training=training), training=training)


def test_model_that_calls_convert_is_converted():
    model = Converting()
    assert type(model.norm) is Norm
    model(_images())
    fused = convert(model, verbose=0)
    _assert_same(_train(fused, _images()), _train(model, _images()))
    assert type(fused.norm) is tfops.keras.BatchNormalization
    assert _calls(fused.backbone, "norm") == ["add+relu"]
    assert type(Converting().norm) is Norm


def test_classes_are_kept():
    inputs = keras.Input((4, 4, 3))
    model = WithStep(inputs, layers.Dense(2)(Norm()(Derived(name="derived")(inputs))))
    fused = convert(model, verbose=0)
    assert type(fused) is WithStep
    assert type(fused.get_layer("derived")) is Derived


def test_what_layers_hold_besides_weights_is_kept():
    inputs = keras.Input((4, 4, 3))
    normalization = layers.Normalization()
    normalization.adapt(_images())
    factor = 3.0
    y = layers.Lambda(lambda x: factor * x)(normalization(inputs))
    y = layers.Conv2D(4, 1, kernel_regularizer="l2", trainable=False, name="frozen")(y)
    y = layers.Dropout(0.5, seed=7)(Norm(gamma_regularizer="l1", momentum=0.5, name="regular")(y))
    y = layers.ReLU()(Norm(trainable=False, name="frozen_norm")(y))
    model = keras.Model(inputs, layers.Dense(2, name="dense")(y))
    model.get_layer("dense").bias.trainable = False
    model(_images(), training=True)  # Dropout's seed moves on
    fused = _check(model, _images(), {"regular": "", "frozen_norm": "relu"})
    trainable = [variable.path for variable in model.trainable_variables]
    assert [variable.path for variable in fused.trainable_variables] == trainable
    assert trainable == ["regular/gamma", "regular/beta", "dense/kernel"]
    assert [layer.trainable for layer in fused.layers if layer.weights] == [True, False, True, False, True]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_dtype_policies_are_kept(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = _add_then(layers.ReLU(), residual=keras.Sequential([layers.Conv2D(3, 1), Norm(), layers.ReLU()]))
        model.compile("sgd", "mse")
    finally:
        keras.config.set_dtype_policy("float32")
    fused = convert(model, verbose=0)
    assert _calls(fused, "norm") == ["add+relu"]
    assert [layer.dtype_policy.name for layer in fused.layers[1:]] == [policy] * 5
    assert type(fused.optimizer) is type(model.optimizer)  # one that scales the loss, for float16
    y, want = (tf.cast(each(_images()), tf.float64) for each in (fused, model))
    tolerance = {"float64": 1e-6, "mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}[policy]
    np.testing.assert_allclose(y, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_training_goes_on():
    """With the optimizer's state, in whatever order the variables are."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 3))
    y = [Norm()(layers.Conv2D(3, 1)(inputs)), Norm()(layers.Conv2D(3, 1)(layers.Conv2D(3, 1)(inputs)))]
    y = layers.ReLU()(layers.Add()([y[1], y[0]]))
    model = keras.Model(inputs, layers.Dense(2)(y))
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    x, target = _images(), tf.zeros((6, 4, 4, 2))
    model.fit(x, target, epochs=3, verbose=0)
    fused = convert(model, verbose=0)
    assert int(fused.optimizer.iterations) == 3
    histories = [each.fit(x, target, epochs=3, verbose=0).history for each in (fused, model)]
    for name, values in histories[1].items():
        np.testing.assert_allclose(histories[0][name], values, rtol=1e-5)


def test_masks_are_kept():
    inputs = keras.Input((5, 3))
    y = layers.Masking()(inputs)
    y = layers.ReLU()(Norm(name="norm")(y))
    y = layers.Add()([Norm(name="joined")(layers.Dense(3)(y)), y])
    x = tf.concat([_images(6, 3, 3), tf.zeros((6, 2, 3))], 1)
    _check(keras.Model(inputs, layers.LSTM(2)(y)), x, {"norm": "relu", "joined": "add"})


def test_unfolded_layers_get_names_of_their_own():
    inputs = keras.Input((4, 4, 3))
    norm = tfops.keras.BatchNormalization(activation="leaky_relu", name="norm")
    y = layers.Conv2D(3, 1, name="norm_add")(norm(inputs, residual=inputs))
    model = keras.Model(inputs, norm(y, training=False))
    back = convert(model, to="keras", verbose=0)
    names = [layer.name for layer in back.layers[1:]]
    assert sorted(names) == ["norm", "norm_add", "norm_add_", "norm_leaky_relu"]
    np.testing.assert_allclose(back(_images()), model(_images()), atol=1e-5)


def test_calls_by_keyword_are_folded():
    inputs = keras.Input((4, 4, 3))
    y = layers.ReLU()(inputs=Norm(name="first")(inputs=inputs))
    y = layers.Activation("silu")(inputs=layers.Add()(inputs=[y, Norm(name="second")(layers.Dense(3)(y))]))
    y = keras.ops.relu(x=keras.ops.add(x1=Norm(name="third")(layers.Dense(3)(y)), x2=y))
    fused = _check(
        keras.Model(inputs, layers.Dense(2)(y)), _images(), {"first": "relu", "second": "add+silu", "third": "add+relu"}
    )
    again = keras.models.clone_model(fused)
    again.set_weights(fused.get_weights())
    np.testing.assert_allclose(again(_images()), fused(_images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("graph", [False, True])
def test_additions_that_turn_out_to_broadcast_say_so(graph):
    inputs = [keras.Input((None, 3)), keras.Input((None, 3))]
    model = keras.Model(inputs, layers.ReLU()(layers.Add(name="sum")([inputs[1], Norm()(inputs[0])])))
    fused = convert(model, verbose=0)
    message = r"the addition sum adds shapes \(6, 1, 3\) and \(6, 4, 3\), but .*convert\(\.\.\., fold=False\) keeps"
    with pytest.raises(ValueError, match=message):
        (tf.function(fused) if graph else fused)([_images(6, 4, 3), _images(6, 1, 3)])
    assert convert(model, fold=False, verbose=0)([_images(6, 4, 3), _images(6, 1, 3)]).shape == (6, 4, 3)
