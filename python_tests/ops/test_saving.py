"""Models are saved in every format, loaded in a fresh process, run there and trained on; and served without tfops."""

from __future__ import annotations

import contextlib
import io
import json
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfops
from tfops import _library
from tfops_testing.fresh_process import run_python


def _model():
    """With fused batch norms of every sort: alone, with an activation, with a residual and an activation."""
    inputs = keras.Input((6, 6, 3))
    shortcut = layers.BatchNormalization(name="alone")(layers.Conv2D(4, 3, padding="same")(inputs))
    y = layers.ReLU()(layers.BatchNormalization(name="silu")(layers.Conv2D(4, 3, padding="same")(inputs)))
    y = layers.BatchNormalization(name="added")(layers.Conv2D(4, 3, padding="same")(y))
    y = layers.Activation("silu")(layers.Add()([shortcut, y]))
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(y)))


def _fresh_process(code, *arguments):
    """Runs the code in a new interpreter; returns the object that it prints last, as JSON."""
    run = run_python("-c", textwrap.dedent(code), *arguments)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a trained model in every format, data, and what the model makes of them, now and a step later."""
    folder = tmp_path_factory.mktemp("saved")
    keras.utils.set_random_seed(0)
    model = tfops.keras.convert(_model(), verbose=0)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    x = np.random.default_rng(0).standard_normal((8, 6, 6, 3)).astype(np.float32)
    target = np.ones((8, 2), np.float32)
    model.fit(x, target, batch_size=8, epochs=2, verbose=0)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    (folder / "model.json").write_text(model.to_json())
    tf.saved_model.save(model, str(folder / "saved_model"))
    with contextlib.redirect_stdout(io.StringIO()):  # Keras 3.5 cannot be told to be quiet
        model.export(str(folder / "exported"))
    arrays = {"x": x, "target": target, "before": model(x).numpy()}
    model.fit(x, target, batch_size=8, epochs=1, verbose=0)
    np.savez(folder / "data.npz", **arrays, after=model(x).numpy())
    return folder


def test_every_format_loads_in_a_fresh_process(saved):
    """Every format gives the same outputs, and what can be trained gets where the original has got."""
    differences = _fresh_process(
        """
        import json, sys
        import keras, numpy as np, tensorflow as tf
        import tfops

        folder = sys.argv[1]
        data = np.load(f"{folder}/data.npz")
        x, target = data["x"], data["target"]
        differences = {}

        def compare(name, y, wanted):
            differences[name] = float(np.abs(y - data[wanted]).max())

        model = keras.models.load_model(f"{folder}/model.keras")
        compare(".keras", model(x), "before")
        model.fit(x, target, batch_size=8, verbose=0)
        compare(".keras, trained on", model(x), "after")

        model = keras.models.model_from_json(open(f"{folder}/model.json").read())
        model.load_weights(f"{folder}/model.weights.h5")
        compare("weights", model(x), "before")

        model = tf.saved_model.load(f"{folder}/saved_model")
        compare("SavedModel", model.signatures["serving_default"](tf.constant(x))["output_0"], "before")
        exported = tf.saved_model.load(f"{folder}/exported")
        compare("exported", exported.serve(x), "before")

        # The function that was saved has a gradient, and its batch norms are trained where it says so.
        weights = list(exported.trainable_variables)
        assert len(weights) == 14, len(weights)
        losses = []
        for _ in range(3):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((exported.serve(x) - target) ** 2)
            for weight, gradient in zip(weights, tape.gradient(loss, weights)):
                weight.assign_sub(0.1 * gradient)
            losses.append(float(loss))
        differences["exported, trained on"] = max(0.0, losses[-1] - losses[0])
        print(json.dumps(differences))
        """,
        saved,
    )
    names = [".keras", ".keras, trained on", "weights", "SavedModel", "exported", "exported, trained on"]
    assert list(differences) == names
    assert max(differences.values()) < 1e-5, differences


def test_saved_model_is_served_without_tfops(saved):
    """A SavedModel needs the op library alone, none of the project's Python."""
    difference = _fresh_process(
        """
        import sys
        import numpy as np, tensorflow as tf

        folder, library = sys.argv[1:]
        tf.load_op_library(library)
        data = np.load(f"{folder}/data.npz")
        difference = max(
            float(np.abs(tf.saved_model.load(f"{folder}/{name}").signatures["serving_default"](
                tf.constant(data["x"]))["output_0"] - data["before"]).max())
            for name in ("saved_model", "exported")
        )
        assert "tfops" not in sys.modules
        print(difference)
        """,
        saved,
        _library.path("ops", tf.__version__),
    )
    assert difference < 1e-6


def test_tflite_runs_a_model_converted_back(saved):
    model = keras.models.load_model(saved / "model.keras")
    x = np.load(saved / "data.npz")["x"]
    back = tfops.keras.convert(model, to="keras", verbose=0)
    content = tf.lite.TFLiteConverter.from_keras_model(back).convert()
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(y, model(x), atol=1e-5)


def test_weights_go_between_keras_and_tfops(tmp_path):
    model = _model()
    fused = tfops.keras.convert(model, fold=False, verbose=0)
    for variable in fused.variables:
        variable.assign(variable + 1.0)
    fused.save_weights(tmp_path / "w.weights.h5")
    model.load_weights(tmp_path / "w.weights.h5")
    for got, want in zip(model.get_weights(), fused.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)


def test_weights_of_a_subclassed_model_are_saved(tmp_path):
    """Its file has the weights; its class makes Keras' batch norms again."""

    @keras.saving.register_keras_serializable(package="test_saving")
    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.norm = layers.BatchNormalization()

        def call(self, x, training=None):
            return self.norm(x, training=training)

    x = tf.random.stateless_normal((8, 3), (0, 0))
    model = Net()
    model(x, training=True)
    fused = tfops.keras.convert(model, verbose=0)
    y = fused(x)
    fused.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.norm) is layers.BatchNormalization
    again = tfops.keras.convert(loaded, verbose=0)
    assert type(again.norm) is tfops.keras.BatchNormalization
    np.testing.assert_allclose(again(x), y, atol=1e-6)


class _Graph:
    """A TF1 graph with a batch norm and its running statistics, updated in training."""

    def __init__(self):
        v1 = tf.compat.v1
        self.x = v1.placeholder(tf.float32, [None, 3], "x")
        self.is_training = v1.placeholder(tf.bool, [], "is_training")
        variables = [
            v1.get_variable(name, [3], initializer=v1.constant_initializer(value))
            for name, value in (("scale", 2.0), ("offset", 1.0), ("mean", 0.0), ("variance", 1.0))
        ]
        self.y, mean, variance = tfops.fused_batch_norm(
            self.x, *variables, is_training=self.is_training, exponential_avg_factor=0.5, activation="leaky_relu"
        )
        tf.identity(self.y, "y")
        loss = tf.reduce_sum(tf.square(self.y - 1))
        (descent,) = [v1.train.MomentumOptimizer(0.01, 0.9).minimize(loss, var_list=variables[:2])]
        with tf.control_dependencies([descent]):
            self.train = tf.group(variables[2].assign(mean), variables[3].assign(variance), name="train")
        self.saver = v1.train.Saver()


def test_tf1_checkpoints_are_restored_and_trained_on(tmp_path):
    """Restored into a graph made again, and into the graph that was saved with it; then trained on."""
    v1 = tf.compat.v1
    x = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32) * 3
    prefix = str(tmp_path / "model")

    def values(session, train, y):
        results = [session.run(y, {"x:0": x, "is_training:0": False})]
        session.run(train, {"x:0": x, "is_training:0": True})
        return [*results, session.run(y, {"x:0": x, "is_training:0": False})]

    with tf.Graph().as_default(), v1.Session() as session:
        graph = _Graph()
        session.run(v1.global_variables_initializer())
        for _ in range(3):
            session.run(graph.train, {graph.x: x, graph.is_training: True})
        graph.saver.save(session, prefix)
        wanted = values(session, graph.train, graph.y)
    assert np.abs(wanted[1] - wanted[0]).max() > 1e-3
    with tf.Graph().as_default(), v1.Session() as session:
        graph = _Graph()
        graph.saver.restore(session, prefix)
        np.testing.assert_array_equal(values(session, graph.train, graph.y), wanted)
    with tf.Graph().as_default(), v1.Session() as session:
        v1.train.import_meta_graph(prefix + ".meta").restore(session, prefix)
        np.testing.assert_array_equal(values(session, "train", "y:0"), wanted)
