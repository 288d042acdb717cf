"""A converted model has its layers where they were: weights by position, layers by name, calls in their order."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfops
from tfops.keras import convert
from tfops.keras._stand_ins import FoldedLayer
from tfops_testing.requirements import JIT_COMPILE, needs_keras, needs_remat_scope

Norm = layers.BatchNormalization


def _net(seed=0):
    """Two branches of like shapes: whatever loads by position can be loaded wrongly."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4, 4, 3), name="images")
    first = layers.ReLU(name="first_relu")(Norm(name="first")(inputs))
    left = Norm(name="left")(layers.Conv2D(3, 1, name="left_conv")(first))
    right = Norm(name="right")(layers.Conv2D(3, 1, name="right_conv")(first))
    y = layers.Activation("silu", name="silu")(layers.Add(name="plus")([right, first]))
    y = layers.Concatenate(name="join")([left, y])
    y = keras.ops.relu(Norm(name="last")(layers.Conv2D(6, 1, name="last_conv")(y)) + y)
    model = keras.Model(inputs, layers.Dense(2, name="dense")(y))
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def _images(*shape):
    return tf.random.stateless_normal(shape or (6, 4, 4, 3), (0, 0))


def _assert_same(model, other, x=None):
    x = _images() if x is None else x
    for training in (False, True):
        want = model(x, training=training)
        np.testing.assert_allclose(other(x, training=training), want, rtol=0, atol=2e-5 * np.abs(want).max())
    for got, variable in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(got, variable, rtol=0, atol=1e-5)


def _fused():
    return convert(_net(1), verbose=0)


def _reloaded(tmp_path):
    _fused().save(tmp_path / "fused.keras")
    return keras.models.load_model(tmp_path / "fused.keras")


@pytest.mark.parametrize("reload", [False, True], ids=["in process", "reloaded"])
@pytest.mark.parametrize("way", ["stock to fused", "fused to stock"])
@pytest.mark.parametrize(
    "file",
    [
        "w.weights.h5",
        pytest.param("w.weights.json", marks=needs_keras("3.10", "sharded files of weights")),
        "list",
        "checkpoint",
        "tf1-like checkpoint",
    ],
)
def test_weights_load_by_position_both_ways(file, way, reload, tmp_path):
    stock, fused = _net(2), _reloaded(tmp_path) if reload else _fused()
    source, target = (stock, fused) if way == "stock to fused" else (fused, stock)
    if file == "list":
        target.set_weights(source.get_weights())
    elif file.endswith("checkpoint"):
        options = {"root": source} if file == "checkpoint" else {"a": source.layers}
        path = tf.train.Checkpoint(**options).write(str(tmp_path / "checkpoint"))
        options = {"root": target} if file == "checkpoint" else {"a": target.layers}
        tf.train.Checkpoint(**options).read(path).assert_existing_objects_matched()
    else:
        source.save_weights(tmp_path / file, **{"max_shard_size": 1} if file.endswith("json") else {})
        target.load_weights(tmp_path / file)
    _assert_same(source, target)


def _again(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras")


def _clone(model, _):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def _by_json(model, _):
    again = keras.models.model_from_json(model.to_json())
    again.set_weights(model.get_weights())
    return again


COPIES = {
    "saved": _again,
    "cloned": _clone,
    "json": _by_json,
    "pickled": lambda model, _: pickle.loads(pickle.dumps(model)),
    "deep": lambda model, _: copy.deepcopy(model),
    "called": lambda model, _: keras.Model(x := keras.Input((4, 4, 3)), model(x)),
    "part": lambda model, _: keras.Model(model.input, model.get_layer("dense").output),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_copy_stay_fused(how, tmp_path):
    """Are still fused, compute the same, and can be converted back."""
    fused = _fused()
    other = COPIES[how](fused, tmp_path)
    graph = other.layers[-1] if how == "called" else other
    folded = [graph.get_layer(name)._inbound_nodes[0].arguments.kwargs.get("folded") for name in ("first", "right")]
    assert folded == ["relu", "add+silu"]
    back = convert(other, to="keras", verbose=0)
    assert not [each for each in back._flatten_layers() if type(each).__module__.startswith("tfops")]
    _assert_same(_net(1), back)
    _assert_same(_net(1), other)


def test_layer_outputs_that_are_computed_are_unchanged():
    stock, fused = _net(1), _fused()
    there = ["first_relu", "left_conv", "left", "right_conv", "silu", "join", "last_conv", "dense"]
    x = _images()
    for name in there:
        want, got = (keras.Model(each.input, each.get_layer(name).output)(x) for each in (stock, fused))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=name)
    # Parts that begin inside a graph.
    parts = [keras.Model(each.get_layer("left").input, each.get_layer("left").output) for each in (stock, fused)]
    np.testing.assert_allclose(parts[1](x), parts[0](x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "attribute", "message"),
    [
        ("first", "output", "the output of first is not computed: first_relu is folded into the batch norm first"),
        ("right", "output", "the output of right is not computed: plus and silu are folded into the batch norm right"),
        (
            "plus",
            "output",
            "the output of plus is not computed: silu is folded into the batch norm right. The output of silu is",
        ),
        ("plus", "input", "the output of right is not computed: plus and silu are folded into the batch norm right"),
        ("silu", "input", "the output of plus is not computed: silu is folded into the batch norm right"),
        ("first_relu", "input", r"tfops\.keras\.convert\(\.\.\., fold=False\) keeps the others"),
    ],
)
def test_layer_outputs_that_are_not_computed_say_so(name, attribute, message, tmp_path):
    for model in (_fused(), _reloaded(tmp_path)):
        with pytest.raises(ValueError, match=message):
            getattr(model.get_layer(name), attribute)
    assert getattr(convert(_net(), fold=False, verbose=0).get_layer(name), attribute) is not None


def test_operation_outputs_that_are_not_computed_say_so():
    fused = _fused()
    *_, add, relu, _ = fused.operations
    assert not isinstance(add, layers.Layer)
    with pytest.raises(
        ValueError, match=f"the output of {add.name} is not computed: {relu.name} is folded into the batch norm last"
    ):
        _ = add.output
    with pytest.raises(ValueError, match=f"the output of last is not computed: {add.name} and {relu.name} are"):
        _ = fused.get_layer("last").output
    assert relu.output.shape == (None, 4, 4, 6)


def test_layers_called_by_hand_do_what_they_did():
    """What is folded is the calls of the graph, not the layers."""
    stock, fused = _net(1), _fused()
    x = _images() - 1.0
    for name in ("first", "first_relu", "right", "silu"):
        np.testing.assert_allclose(fused.get_layer(name)(x), stock.get_layer(name)(x), rtol=0, atol=1e-5, err_msg=name)
    for model in (stock, fused):
        y = model.get_layer("silu")(model.get_layer("plus")([model.get_layer("right")(x), x]))
        again = keras.Model(z := keras.Input((4, 4, 3)), model.get_layer("silu")(model.get_layer("first")(z)))
        if model is stock:
            want = y, again(x)
    np.testing.assert_allclose(y, want[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(again(x), want[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["leaky_relu", "silu"])
def test_layers_of_a_sequential_called_by_hand_do_what_they_did(name):
    """An activation that has been applied is not applied again, but to what has none it is."""
    model = keras.Sequential([keras.Input((3,)), Norm(name="norm"), layers.Activation(name, name="activation")])
    fused = convert(model, verbose=0)
    x = _images(5, 3)
    y = x
    for layer in fused.layers:
        y = layer(y)
    np.testing.assert_allclose(y, model(x), rtol=0, atol=1e-6)
    np.testing.assert_allclose(fused.layers[1](x), model.layers[1](x), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="the output of norm is not computed: activation is folded"):
        _ = fused.get_layer("norm").output
    with pytest.raises(ValueError, match="the output of norm is not computed"):
        _ = fused.get_layer("activation").input
    part = keras.Model(fused.inputs, fused.get_layer("activation").output)
    np.testing.assert_allclose(part(x), model(x), rtol=0, atol=1e-6)


def _moving_means(model, inputs):
    model(inputs, training=True)
    return {v.path: v.numpy() for v in model.variables if v.name == "moving_mean"}


def _check_order(model, inputs, save=True):
    """Both ways and saved, the moving averages are those of the model."""
    fused = convert(model, verbose=0)
    models = [fused, convert(fused, to="keras", verbose=0)] + ([pickle.loads(pickle.dumps(fused))] if save else [])
    want = _moving_means(model, inputs)
    for each in models:
        got = _moving_means(each, inputs)
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)
    return fused


def _folds(model, name):
    return [node.arguments.kwargs.get("folded") for node in model.get_layer(name)._inbound_nodes]


def test_order_of_a_shared_layers_calls_is_kept():
    norm = Norm(momentum=0.5, name="norm")
    one, two = keras.Input((2,)), keras.Input((2,))
    values = [np.full((4, 2), 1.0), np.full((4, 2), 10.0)]
    # The first is added to what the second gives: deferred, it would come after it.
    y, z = norm(one), norm(two)
    model = keras.Model([one, two], layers.Add()([y, layers.Dense(2)(layers.Dense(2)(z))]))
    assert _folds(_check_order(model, values), "norm") == [None, None]
    # Each is added to its own input, and nothing of its comes in between.
    model = keras.Model([one, two], layers.Concatenate()([layers.Add()([norm(each), each]) for each in (one, two)]))
    fused = _check_order(model, values)
    assert set(_folds(fused, "norm")[-2:]) == {"add"} or None in _folds(fused, "norm")
    relu = layers.ReLU()
    other = Norm(momentum=0.5, name="other")
    model = keras.Model([one, two], [relu(other(one)), layers.Dense(2)(relu(other(layers.Dense(2)(two))))])
    assert _folds(_check_order(model, values), "other") == ["relu", "relu"]


def test_output_of_a_shared_layer_is_that_of_its_first_call():
    """Which need not be the one that Keras makes first when it runs the model."""
    conv = layers.Conv2D(3, 1, name="conv")
    x = keras.Input((4, 4, 3))
    y, z = conv(x), conv(layers.ReLU()(Norm()(layers.Dense(3)(x))))
    model = keras.Model(x, layers.ReLU()(layers.Concatenate()([z, y])))
    fused = convert(model, verbose=0)
    for each in (fused, convert(fused, to="keras", verbose=0)):
        got, want = (keras.Model(m.input, m.get_layer("conv").output)(_images()) for m in (each, model))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        assert _inputs(each, "conv") == _inputs(model, "conv")


def _inputs(model, name):
    return [node.input_tensors[0]._keras_history.operation.name for node in model.get_layer(name)._inbound_nodes]


def test_order_of_a_nested_models_calls_is_kept():
    norm = Norm(momentum=0.5, name="norm")
    x = keras.Input((2,))
    block = keras.Model(x, layers.Add()([norm(x), x]), name="block")
    one, two = keras.Input((2,)), keras.Input((2,))
    y = norm(one)
    z = block(two)
    model = keras.Model([one, two], layers.Concatenate()([layers.Add()([y, layers.Dense(2)(z)]), z]))
    # Keras saves what is shared between models twice.
    _check_order(model, [np.full((4, 2), 1.0), np.full((4, 2), 10.0)], save=False)


def test_unfolding_that_would_change_the_order_of_calls_is_refused():
    """The activation makes one branch longer, and Keras calls the deepest first."""
    norm = tfops.keras.BatchNormalization(activation="relu", name="norm")
    shared = Norm(momentum=0.5, name="shared")
    one, two = keras.Input((2,)), keras.Input((2,))
    y, z = norm(shared(one)), layers.Dense(2)(shared(two))
    for tensors, last in (([y, z], "one"), ([z, y], "two")):
        model = keras.Model([one, two], layers.Concatenate()(tensors))
        values = [np.full((4, 2), 1.0), np.full((4, 2), 10.0)]
        want = _moving_means(keras.models.clone_model(model), values)["shared/moving_mean"][0]
        assert want == {"one": 3.0, "two": 5.25}[last]
        if last == "one":
            with pytest.raises(ValueError, match="calls of shared, which has several, would come in another order"):
                convert(model, to="keras")
        else:
            back = convert(model, to="keras", verbose=0)
            np.testing.assert_allclose(_moving_means(back, values)["shared/moving_mean"], want)


@needs_remat_scope
@pytest.mark.parametrize("mode", ["full", "activations", "larger_than", "list_of_layers"])
def test_remat_scope_is_kept_and_changes_no_result(mode):
    def net(sequential, scope=mode):
        keras.utils.set_random_seed(0)
        with keras.RematScope(mode=scope, output_size_threshold=1, layer_names=["norm", "conv", "relu"]):
            stack = [layers.Conv2D(3, 1, name="conv"), Norm(name="norm"), layers.Activation("silu", name="silu")]
        if sequential:
            return keras.Sequential([keras.Input((4, 4, 3)), *stack])
        x = keras.Input((4, 4, 3))
        y = layers.Add()([stack[1](stack[0](x)), layers.Dense(3, name="shortcut")(x)])
        return keras.Model(x, layers.Dense(2)(stack[2](y)))

    for sequential in (False, True):
        model = net(sequential)
        fused = convert(model, verbose=0)
        back = convert(fused, to="keras", verbose=0)
        for each in (fused, back):
            modes = [layer._remat_mode and layer._remat_mode.mode for layer in each.layers]
            assert modes == [layer._remat_mode and layer._remat_mode.mode for layer in model.layers]
            assert mode in modes
        results = []
        for each in (net(sequential, None), fused, back):  # none is lost, whatever is computed again
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(each(_images(), training=True) ** 3)
            results.append(tape.gradient(loss, each.trainable_variables))
        for got in results[1:]:
            for value, want in zip(got, results[0], strict=True):
                np.testing.assert_allclose(value, want, rtol=1e-3, atol=1e-3)


@needs_remat_scope
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_residuals_have_gradients_in_a_remat_scope(graph):
    x, residual = _images(5, 3), _images(5, 3) + 1.0
    results = []
    for mode in (None, "full"):
        with keras.RematScope(mode=mode):
            norm = tfops.keras.BatchNormalization(activation="silu")
        norm.build(x.shape)

        def gradients(norm=norm):
            with tf.GradientTape() as tape:
                tape.watch([x, residual])
                loss = tf.reduce_sum(norm(x, residual=residual, training=True) ** 3)
            return tape.gradient(loss, [x, residual])

        results.append((tf.function(gradients) if graph else gradients)())
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, JIT_COMPILE])
def test_fit_has_the_losses_of_the_stock_model(jit_compile):
    results = []
    for model in (_net(1), _fused()):
        keras.utils.set_random_seed(0)
        model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
        x = _images(16, 4, 4, 3)
        results.append(model.fit(x, tf.zeros((16, 4, 4, 2)), batch_size=8, epochs=2, verbose=0).history["loss"])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4)


def test_exported_model_computes_the_same(tmp_path):
    fused = _fused()
    with contextlib.redirect_stdout(io.StringIO()):  # Keras 3.5 cannot be told to be quiet
        fused.export(tmp_path / "saved")
    served = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(served.serve(_images()), _net(1)(_images()), rtol=0, atol=1e-4)


def test_nothing_is_computed_for_a_stand_in():
    """In a graph a deferred batch norm and the layers in it leave identities at most."""
    fused = _fused()
    graph = tf.function(lambda x: fused(x, training=True)).get_concrete_function(tf.TensorSpec((6, 4, 4, 3))).graph
    kinds = [operation.type for operation in graph.get_operations()]
    assert kinds.count("Tfops>BatchNormTraining") == 4
    assert not {"Relu", "Sigmoid", "Add"} & set(kinds)
    assert kinds.count("AddV2") <= sum("AddV2" in kind for kind in kinds)


def test_files_with_residual_arguments_load():
    """Before there were stand-ins, a residual was an argument of a batch norm's call."""
    x = keras.Input((4, 4, 3))
    norm = tfops.keras.BatchNormalization(activation="relu", name="norm")
    model = keras.Model(x, layers.Dense(2)(norm(layers.Conv2D(3, 1)(x), residual=x)))
    again = pickle.loads(pickle.dumps(model))
    _assert_same(model, again)
    back = convert(again, to="keras", verbose=0)
    assert [layer.name for layer in back.layers][-3:-1] == ["norm_add", "norm_relu"]
    _assert_same(model, back)


def test_tensors_kept_as_attributes_are_read():
    x = keras.Input((4, 4, 3))
    y = Norm(name="norm")(x)
    model = keras.Model(x, layers.ReLU()(y))
    model.features = {"normed": [y]}
    fused = convert(model, verbose=0)
    assert _folds(fused, "norm") == [None]
    got, want = (keras.Model(each.input, each.features["normed"][0])(_images()) for each in (fused, model))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", ["first_relu", "silu"])
def test_layers_that_were_folded_in_cannot_be_replaced_unnoticed(name):
    fused = _fused()
    assert isinstance(fused.get_layer("first_relu"), FoldedLayer)

    def other(layer):
        same = type(layer).from_config(layer.get_config())
        return layers.Dropout(0.5, name=name) if layer.name == name else same

    with pytest.raises(ValueError, match=rf"{name} \(Dropout\) cannot read the output of \w+, which is not computed"):
        keras.models.clone_model(fused, clone_function=other)


def test_other_readers_of_outputs_that_are_not_computed_are_refused():
    x = keras.Input((4,))
    y = layers.Activation("softsign")(layers.Add(name="sum")([Norm(name="norm")(x), x]))
    fused = convert(keras.Model(x, y), verbose=0)

    def other(layer):
        if layer.name == "sum":
            return layers.Multiply(name="sum")
        return type(layer).from_config(layer.get_config())

    message = r"sum \(Multiply\) cannot read the output of norm, which is not computed: the addition is folded into"
    with pytest.raises(ValueError, match=message):
        keras.models.clone_model(fused, clone_function=other)
    # A stand-in of something else is no stand-in.
    norm, silu = tfops.keras.BatchNormalization(), FoldedLayer(layers.Activation("silu", name="silu"))
    y = norm(x, folded="relu")
    with pytest.raises(ValueError, match=r"silu \(FoldedLayer\) cannot read .*: relu is folded into the batch norm"):
        silu(y)
    with pytest.raises(ValueError, match="cannot read"):
        _ = y + 1.0
    # What has been left out or put in within a Sequential.
    stack = convert(keras.Sequential([keras.Input((4,)), Norm(), layers.ReLU(), layers.Dense(2)]), verbose=0)
    with pytest.raises(ValueError, match=r"dense\w* \(Dense\) cannot read the output of batch_normalization"):
        keras.Sequential([keras.Input((4,)), stack.layers[0], stack.layers[2]])
