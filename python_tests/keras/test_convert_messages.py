"""What `convert` says that it has done, and what it refuses."""

from __future__ import annotations

import keras
import pytest
import tensorflow as tf
from keras import layers

import tfops
from tfops.keras import convert

Norm = layers.BatchNormalization


class Derived(Norm):
    pass


def _net():
    x = keras.Input((3,))
    return keras.Model(x, layers.ReLU()(Norm()(x)))


def _line(model, capsys, **kwargs):
    copy = convert(model, **kwargs)
    (line,) = capsys.readouterr().out.splitlines()
    return copy, line


def test_verbose_names_every_batch_norm_and_why(capsys):
    inputs = keras.Input((4, 4, 3))
    y = [layers.Conv2D(5, 1)(inputs), Norm(name="shortcut")(layers.Conv2D(5, 1)(inputs))]
    y = layers.Add(name="add")([y[1], Norm(name="main")(y[0])])
    y = layers.Conv2D(2, 1, name="conv")(Norm(name="other")(layers.ReLU(name="relu")(y)))
    model = keras.Model(inputs, y, name="net")
    fused = convert(model, verbose=2)
    assert capsys.readouterr().out.splitlines() == [
        "net: 3 batch norms replaced: 1 with addition and ReLU, 2 alone (another batch norm takes the addition: 1; no "
        "activation follows: 1)",
        "  shortcut  alone: another batch norm takes the addition (add)",
        "  main      addition and ReLU: add, relu",
        "  other     alone: no activation follows (conv (Conv2D))",
    ]
    convert(fused, to="keras", verbose=2)
    assert capsys.readouterr().out.splitlines() == [
        "net: 3 batch norms replaced: 1 that had addition and ReLU, 2 alone",
        "  shortcut  alone",
        "  main      addition and ReLU: add, relu",
        "  other     alone",
    ]
    convert(model, fold=False)
    assert capsys.readouterr().out == "net: 3 batch norms replaced\n"
    convert(fused, verbose=0)
    assert capsys.readouterr().out == ""
    y = Derived(name="derived")(Norm(name="norm")(inputs))
    convert(keras.Model(inputs, [y, keras.ops.tanh(y), layers.ReLU()(y)], name="net"))
    assert capsys.readouterr().out == (
        "net: 1 of 2 batch norms replaced: 1 alone (no activation follows); left as they are, because their classes "
        "derive from Keras': derived (Derived)\n"
    )
    convert(keras.Model(inputs, layers.ReLU()(inputs), name="none"))
    assert capsys.readouterr().out == "none: there are no batch norms to replace\n"


def test_one_line_counts_by_what_was_folded(capsys):
    x = keras.Input((4, 4, 3))
    _, line = _line(keras.Model(x, layers.ReLU()(Norm()(x)), name="one"), capsys)
    assert line == "one: 1 batch norm replaced: 1 with ReLU"
    y = layers.LeakyReLU(0.2)(Norm()(layers.ReLU(6)(Norm()(x))))
    y = Norm()(y)
    y = layers.Concatenate()([y, layers.Conv2D(2, 1)(y)])
    y = layers.PReLU()(Norm()(y))
    y = layers.Add()([Norm()(y), y])
    y = layers.Activation("silu")(layers.Add()([Norm()(y), y]))
    model = keras.Model(x, layers.Dense(2)(layers.TimeDistributed(Norm())(y)), name="many")
    fused, line = _line(model, capsys)
    assert line == (
        "many: 7 batch norms replaced: 1 with ReLU6, 1 with LeakyReLU, 1 with addition, 1 with addition and SiLU, 3 "
        "alone (read by two layers: 1; the activation is not one that can be folded in: 1; in a model or "
        "layer whose graph cannot be seen: 1)"
    )
    _, line = _line(fused, capsys, to="keras")
    assert line == (
        "many: 7 batch norms replaced: 1 that had ReLU6, 1 that had LeakyReLU, 1 that had addition, 1 that had "
        "addition and SiLU, 3 alone"
    )


def test_classes_that_are_left_alone_are_named(capsys):
    stack = [keras.Input((3,)), *(Derived(name=f"d{i}") for i in range(7)), Norm(), layers.ReLU()]
    fused, line = _line(keras.Sequential(stack, name="net"), capsys)
    assert line == (
        "net: 1 of 8 batch norms replaced: 1 with ReLU; left as they are, because their classes derive from Keras': d0 "
        "(Derived), d1 (Derived), d2 (Derived), d3 (Derived), d4 (Derived) and 2 more"
    )
    _, line = _line(fused, capsys, to="keras")
    assert line == "net: 1 batch norm replaced: 1 that had ReLU"


class NoConfig(keras.Model):
    def __init__(self, head):
        super().__init__()
        self.head, self.norm = head, Norm()

    def call(self, x):
        return self.head(self.norm(x))


class Fused(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = tfops.keras.BatchNormalization(activation="relu")

    def call(self, x):
        return self.norm(x)


class Changed(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = Norm()

    def call(self, x):
        return self.extra(self.norm(x))


def test_refusals_name_what_is_wrong():
    with pytest.raises(TypeError, match=r"model must be a keras\.Model, but it is <Dense"):
        convert(layers.Dense(2))
    with pytest.raises(ValueError, match="to must be one of 'tfops', 'keras', but it is 'onnx'"):
        convert(_net(), to="onnx")
    with pytest.raises(ValueError, match="verbose must be 0, 1 or 2, but it is 3"):
        convert(_net(), verbose=3)
    with pytest.raises(ValueError, match=r"cannot convert no_config\w* \(NoConfig\): it cannot be copied"):
        convert(NoConfig(layers.Dense(2)))
    with pytest.raises(ValueError, match=r"cannot convert fused\w* \(Fused\).* has the fused activation 'relu'"):
        convert(Fused(), to="keras")
    model = Changed()
    model.extra = Norm()
    model(tf.zeros((2, 3)))
    with pytest.raises(
        ValueError, match=r"cannot convert changed\w* \(Changed\): it holds 2 layers, but its class makes 1"
    ):
        convert(model)
    assert type(Norm()) is Norm  # after all these errors


def test_calls_that_differ_are_told_apart(capsys):
    x = keras.Input((3,))
    norm = Norm(name="norm")
    y = layers.ReLU(name="one")(norm(x))
    y = layers.Add(name="sum")([norm(y), y])
    y = layers.Dense(3, name="dense")(norm(y))
    fused = convert(keras.Model(x, y, name="net"), verbose=2)
    assert capsys.readouterr().out.splitlines() == [
        "net: 1 batch norm replaced: 1 with ReLU in 1 of 3 calls and addition in 1 of 3 calls and nothing in 1 of 3 "
        "calls",
        "  norm  3 calls: ReLU: one; addition: sum; alone: no activation follows (dense (Dense))",
    ]
    convert(fused, to="keras", verbose=2)
    assert capsys.readouterr().out.splitlines()[1] == "  norm  3 calls: ReLU: one; addition: sum; alone"
    norm, relu = Norm(name="norm"), layers.ReLU(name="relu")
    _, line = _line(keras.Model(x, relu(norm(relu(norm(x)))), name="net"), capsys)
    assert line == "net: 1 batch norm replaced: 1 with ReLU"


def test_copies_can_be_unfolded(capsys):
    x = keras.Input((3,))
    inner = keras.Sequential([keras.Input((3,)), Norm(name="inner"), layers.ReLU(name="inner_relu")], name="stack")
    y = layers.ReLU(name="relu")(layers.Add(name="sum")([Norm(name="norm")(inner(x)), x]))
    model = keras.Model(x, y, name="net")
    fused = convert(model, verbose=0)
    plain, line = _line(fused, capsys, fold=False)
    assert line == "net: 2 batch norms unfolded: 1 that had ReLU, 1 that had addition and ReLU"
    kinds = [type(layer) for layer in plain._flatten_layers() if layer.name in ("inner", "norm", "sum", "inner_relu")]
    assert sorted(each.__name__ for each in kinds) == ["Add", "BatchNormalization", "BatchNormalization", "ReLU"]
    assert type(plain.get_layer("norm")) is tfops.keras.BatchNormalization
    assert plain.get_layer("norm").output is not None
    assert plain.get_layer("stack").get_layer("inner").folded is None
    x = tf.random.stateless_normal((5, 3), (0, 0))
    tf.debugging.assert_near(plain(x), model(x), atol=1e-5)
    _, line = _line(plain, capsys, fold=False)
    assert line == "net: there are no batch norms to replace"
    _, line = _line(convert(plain, verbose=0), capsys, to="keras")
    assert line == "net: 2 batch norms replaced: 1 that had ReLU, 1 that had addition and ReLU"
