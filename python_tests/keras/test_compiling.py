"""A converted model is compiled as the original is: losses, metrics, and how it runs."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, optimizers

from tfops.keras import convert
from tfops_testing.compiled_models import EXACT, TARGET, TOLERANCE, X, assert_trains_alike, fit_and_convert, make_model
from tfops_testing.requirements import needs_keras

SCALE = 0.5  # for functions to refer to


def _two_outputs(names=("left", "right")):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,), dtype="float64")
    y = layers.ReLU(dtype="float64")(layers.BatchNormalization(dtype="float64", name="second", **EXACT)(inputs))
    left = layers.Dense(3, dtype="float64", name=names[0])(y)
    right = layers.BatchNormalization(dtype="float64", name="inner", **EXACT)(
        layers.Dense(3, use_bias=False, dtype="float64")(y)
    )
    return keras.Model(inputs, {"left": left, "right": layers.ReLU(dtype="float64", name=names[1])(right)}, name="net")


class Counted(keras.metrics.Metric):
    """With a state of its own, and known to nobody by name."""

    def __init__(self, factor, name="counted"):
        super().__init__(name=name)
        self.factor = factor
        self.count = self.add_weight(initializer="zeros", name="count")

    def update_state(self, y, z, sample_weight=None):
        self.count.assign_add(self.factor if sample_weight is None else self.factor * tf.reduce_sum(sample_weight))

    def result(self):
        return self.count

    def get_config(self):
        return {"factor": self.factor, "name": self.name}


def _closure(power):
    def loss(y, z):
        return tf.reduce_mean(tf.abs(tf.cast(y, z.dtype) - z) ** power, -1)

    return loss


needs_names = needs_keras("3.7", "losses by the names of outputs")
COMPILED = {
    "by_name": {"loss": {"left": "mse", "right": "mae"}, "loss_weights": {"left": 1.0, "right": 0.25}},
    "functions": {
        "loss": {"left": lambda y, z: SCALE * tf.reduce_mean(z**2, -1), "right": _closure(1.5)},
        "metrics": {"left": [lambda y, z: tf.reduce_mean(z) * SCALE, _closure(2)], "right": "mae"},
    },
    "objects": {
        "loss": {"left": keras.losses.Huber(0.3), "right": keras.losses.MeanSquaredError()},
        "metrics": {"left": [Counted(2.0), "mae"], "right": Counted(3.0, "other")},
        "weighted_metrics": {"left": [Counted(1.0, "weighted")], "right": ["mse"]},
    },
    "wrapped": {
        "loss": {"left": "mse", "right": "mse"},
        "metrics": {"left": keras.metrics.MeanMetricWrapper(lambda y, z: SCALE * tf.abs(z), name="wrapped")},
    },
}


@needs_names
@pytest.mark.parametrize("name", COMPILED)
def test_losses_and_metrics_are_kept(name):
    model = _two_outputs()
    model.compile(optimizers.SGD(0.01, momentum=0.9), **COMPILED[name], run_eagerly=True)
    targets, weights = {"left": TARGET, "right": 2 * TARGET}, np.linspace(0.5, 1.5, len(X))
    model.fit(X, targets, epochs=2, verbose=0)
    copy = convert(model, verbose=0)
    counters = {id(metric) for metric in model._compile_metrics.metrics} if "metrics" in COMPILED[name] else set()
    assert_trains_alike(model, copy, target=targets, sample_weight=weights)
    assert not counters & {id(metric) for metric in copy.metrics}
    results = [each.evaluate(X, targets, sample_weight=weights, verbose=0, return_dict=True) for each in (model, copy)]
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        np.testing.assert_allclose(results[1][key], value, rtol=TOLERANCE, err_msg=key)


@needs_names
def test_loss_named_after_the_only_output_is_kept():
    inputs = keras.Input((5,), dtype="float64")
    y = layers.BatchNormalization(name="second", dtype="float64", **EXACT)(inputs)
    model = keras.Model(inputs, layers.ReLU(name="out", dtype="float64")(y))
    model.compile(optimizers.SGD(0.01), {"out": "mse"}, metrics={"out": "mae"}, run_eagerly=True)
    copy = convert(model, verbose=0)
    assert copy.output_names == model.output_names == ["out"]
    assert_trains_alike(model, copy, target=X)


def test_a_metric_of_two_outputs_stays_one():
    model = _two_outputs()
    metric = Counted(1.0)
    model.compile("sgd", "mse", metrics={"left": metric, "right": metric}, run_eagerly=True)
    model.fit(X, {"left": TARGET, "right": TARGET}, verbose=0)
    copy = convert(model, verbose=0)
    copy.evaluate(X, {"left": TARGET, "right": TARGET}, verbose=0)
    assert len({id(each) for each in copy._compile_metrics.metrics}) == 1


def test_metrics_of_the_copy_do_not_count_for_the_model():
    model = make_model()
    model.compile("sgd", "mse", metrics=[Counted(1.0)], run_eagerly=True)
    copy = fit_and_convert(model)
    before = model.get_metrics_result()["counted"]
    copy.evaluate(X, TARGET, batch_size=1, verbose=0)
    assert copy.get_metrics_result()["counted"] == 16
    assert model.get_metrics_result()["counted"] == before


@pytest.mark.parametrize(
    "options",
    [{"run_eagerly": True}, pytest.param({"jit_compile": True}, marks=pytest.mark.xla), {"steps_per_execution": 2}],
    ids=str,
)
def test_options_of_how_it_runs_are_kept(options):
    model = make_model()
    model.compile(optimizers.SGD(0.01), "mse", **options)
    copy = fit_and_convert(model)
    for name in ("run_eagerly", "jit_compile", "steps_per_execution"):
        assert getattr(copy, name) == getattr(model, name), name
    assert_trains_alike(model, copy)


def test_what_was_set_after_compiling_is_kept():
    model = make_model()
    model.compile("sgd", "mse")
    model.run_eagerly = True
    model.optimizer = optimizers.Adam(0.01)
    copy = convert(model, verbose=0)
    assert copy.run_eagerly
    assert type(copy.optimizer) is optimizers.Adam


def test_copy_trains_on_after_saving_and_loading(tmp_path):
    model = make_model()
    model.compile(optimizers.Adam(0.01), "mse", metrics=["mae"], run_eagerly=True)
    copy = fit_and_convert(model)
    copy.save(tmp_path / "copy.keras")
    assert_trains_alike(copy, keras.models.load_model(tmp_path / "copy.keras"))


def test_copy_converted_back_trains_on():
    model = make_model()
    model.compile(optimizers.Adam(0.01), "mse", metrics=["mae"], run_eagerly=True)
    back = convert(fit_and_convert(model), to="keras", verbose=0)
    assert_trains_alike(model, back)


def test_copy_is_compiled_and_built_only_if_the_model_is():
    assert not convert(make_model(), verbose=0).compiled
    model = keras.Sequential([layers.Dense(3, name="second"), layers.BatchNormalization(), layers.ReLU()])
    model.compile(optimizers.Adam(0.01), "mse", run_eagerly=True)
    copy = convert(model, verbose=0)
    assert copy.compiled
    assert not copy.optimizer.built
    copy.fit(X, TARGET, verbose=0)


def test_strategy_is_kept():
    devices = tf.config.list_logical_devices("CPU")
    strategy = tf.distribute.MirroredStrategy([device.name for device in devices[:1]])
    with strategy.scope():
        model = make_model()
        model.compile(optimizers.Adam(0.01), "mse", metrics=["mae"], run_eagerly=True)
        model.fit(X, TARGET, verbose=0)
        copy = convert(model, verbose=0)
    assert copy.optimizer._distribution_strategy is strategy
    assert_trains_alike(model, copy)


# ----------------------------------------------------------------------------------------------------------------------
# Classes with a mind of their own


class Task(keras.Model):
    """Compiles itself when it is constructed, as keras_hub's tasks do."""

    def __init__(self, **kwargs):
        inputs = keras.Input((5,), dtype="float64")
        y = layers.BatchNormalization(name="second", dtype="float64", **EXACT)(inputs)
        super().__init__(inputs, layers.Dense(3, dtype="float64", name="head")(y), **kwargs)
        self.compile()

    def compile(self, optimizer="auto", loss="auto", *, metrics="auto", **kwargs):
        optimizer = optimizers.Adam(2e-5) if optimizer == "auto" else optimizer
        metrics = ["mse"] if metrics == "auto" else metrics
        super().compile(optimizer, loss="mae" if loss == "auto" else loss, metrics=metrics, **kwargs)

    def get_config(self):
        return {}


def test_task_is_compiled_as_its_user_compiled_it():
    keras.utils.set_random_seed(0)
    model = Task()
    assert convert(model, verbose=0).loss == "mae"
    model.compile(optimizers.SGD(0.01, momentum=0.9), _closure(2), metrics=None, run_eagerly=True)
    copy = fit_and_convert(model)
    assert copy.run_eagerly
    assert copy.metrics_names == model.metrics_names
    assert_trains_alike(model, copy)
    model.compiled = False  # as after loading without it
    assert not convert(model, verbose=0).compiled


class WithMargin(Task):
    """Takes more than Keras' `compile`, and less."""

    def compile(self, optimizer="sgd", loss="mse", margin=1.0, second="sgd", metric=None):
        self.margin, self.second = margin, optimizers.get(second)
        self.metric = metric
        super().compile(optimizer, loss)


def test_further_arguments_of_compile_are_kept():
    model = WithMargin(name="net")
    metric = Counted(2.0)
    model.compile(optimizers.Adam(0.01), "mae", margin=3.0, second=optimizers.SGD(0.25, momentum=0.5), metric=metric)
    model.run_eagerly = True
    model.second.build(model.trainable_variables)
    model.second.iterations.assign(7)
    copy = fit_and_convert(model)
    assert copy.margin == 3.0
    assert copy.second is not model.second
    assert copy.metric is not model.metric
    assert copy.metric.factor == 2.0
    assert int(copy.second.iterations) == 7
    assert copy.second._trainable_variables[0] is copy.trainable_variables[0]
    assert_trains_alike(model, copy)


class Stubborn(Task):
    def compile(self, optimizer="sgd", loss="mse", **kwargs):
        super().compile("rmsprop", loss, **kwargs)


def test_optimizer_that_the_class_chooses_is_kept():
    model = Stubborn(name="net")
    model.compile("adam", "mae", run_eagerly=True)
    copy = fit_and_convert(model)
    assert type(copy.optimizer) is optimizers.RMSprop
    assert_trains_alike(model, copy)


class Forgetful(Task):
    def compile(self, optimizer="sgd", loss="mse", margin=1.0, **kwargs):
        super().compile(optimizer, loss, **kwargs)


class Doubling(Task):
    def compile(self, optimizer="sgd", loss="mse", margin=1.0, **kwargs):
        self.margin = 2 * margin
        super().compile(optimizer, loss, **kwargs)


class Growing(Task):
    calls = 0

    def compile(self, optimizer="sgd", loss="mse"):
        Growing.calls += 1
        super().compile(optimizer, loss, metrics=["mse"] * Growing.calls)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Forgetful, r"takes what net does not keep \(margin\)"),
        (Doubling, r"makes something else of what it is given \(margin\)"),
        (Growing, r"makes something else .*\(metrics\)"),
    ],
)
def test_compile_that_cannot_be_repeated_warns(cls, reason):
    model = cls(name="net")
    model.compile(optimizers.Adam(0.01), "mae")
    with pytest.warns(UserWarning, match=f"the copy of net is not compiled: {cls.__name__}.compile.. {reason}") as w:
        copy = convert(model, verbose=0)
    (warning,) = (each for each in w if each.category is UserWarning)
    assert "copy.compile(...)" in str(warning.message)
    assert "share paths" not in str(warning.message)
    assert warning.filename == __file__
    assert not copy.compiled
    assert copy.optimizer is None
    copy.compile(optimizers.Adam(0.01), "mae")  # as told
    copy.fit(X, TARGET, verbose=0)


@keras.saving.register_keras_serializable(package="test")
class TwoOptimizers(keras.Model):
    """Says itself how it is compiled."""

    def compile(self, first, second):
        super().compile(loss="mse", run_eagerly=True)
        self.first, self.second = first, second

    def get_compile_config(self):
        serialize = keras.saving.serialize_keras_object
        return {"first": serialize(self.first), "second": serialize(self.second)}

    def compile_from_config(self, config):
        self.compile(**{name: keras.saving.deserialize_keras_object(each) for name, each in config.items()})

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        self.first.apply(gradients[:3], variables[:3])
        self.second.apply(gradients[3:], variables[3:])
        return {"loss": loss}


def test_compile_config_of_the_class_is_followed():
    model = make_model(cls=TwoOptimizers)
    model.compile(optimizers.Adam(0.01), optimizers.SGD(0.01, momentum=0.9))
    model.fit(X, TARGET, epochs=3, verbose=0)
    copy = convert(model, fold=False, verbose=0)
    assert int(copy.second.iterations) == 3
    assert_trains_alike(model, copy)


class Weighted(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm, self.alpha, self.mode, self.seen = layers.BatchNormalization(), 1.0, "a", None

    def call(self, x, training=None):
        return self.norm(x, training=training)


def test_plain_attributes_that_no_config_holds_are_kept():
    model = Weighted()
    model(np.ones((2, 4), "float32"))
    model.alpha, model.table = 5.0, {"a": [1, ("x", None)]}
    model.norm.lr_mult = 0.1
    copy = convert(model, verbose=0)
    assert (copy.alpha, copy.mode, copy.seen, copy.norm.lr_mult) == (5.0, "a", None, 0.1)
    assert copy.table == model.table
    copy.table["a"].append(2)
    assert len(model.table["a"]) == 2


def test_plain_attributes_of_layers_in_graphs_go_there_and_back():
    model = make_model()
    for index, layer in enumerate(model.layers):
        layer.lr_mult = index
    copy = convert(model, verbose=0)
    back = convert(copy, to="keras", verbose=0)
    for each in (copy, back):
        assert [layer.lr_mult for layer in each.layers] == list(range(len(model.layers)))
    folded = [layer for layer in copy.layers if type(layer).__name__ == "FoldedLayer"]
    assert folded
    assert not any("negative_slope" in vars(layer) for layer in folded)  # only what its class does not make
    assert not any({"folded", "activation"} & set(vars(layer)) for layer in back.layers if "Batch" in str(type(layer)))
    again = convert(copy, verbose=0)
    kinds = [[getattr(layer, "folded", None) for layer in each.layers] for each in (copy, again)]
    assert kinds[0] == kinds[1]
