"""A converted model is compiled as the original is, and trains on as that does, whatever it was compiled with."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, optimizers

import tfops
from tfops.keras import convert

X = np.random.default_rng(0).normal(size=(16, 5))
TARGET = np.random.default_rng(1).normal(size=(16, 3))
TOLERANCE = 1e-9  # relative, where the arithmetic is float64
EXACT = {"epsilon": 2.0**-10, "momentum": 0.75}  # in float32 too


def _model(dtype="float64", cls=keras.Model):
    """A residual block whose addition is folded in; the later of its batch norms was made first."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,), dtype=None if "mixed" in dtype else dtype)
    # No biases: their gradients are rounding errors before a batch norm, and Adam makes much of them.
    dense = {"units": 4, "use_bias": False, "dtype": dtype}
    first = layers.BatchNormalization(name="first", dtype=dtype, **EXACT)(layers.Dense(**dense)(inputs))
    second = layers.Dense(**dense)(layers.Dense(name="two", **dense)(inputs))
    second = layers.BatchNormalization(name="second", dtype=dtype, **EXACT)(second)
    y = layers.ReLU(dtype=dtype)(layers.Add(dtype=dtype)([second, first]))
    return cls(inputs, layers.Dense(3, dtype=dtype, name="head")(y), name="net")


def _assert_trains_alike(model, copy, x=X, target=TARGET, rtol=TOLERANCE, **kwargs):
    """Both models fit on: the same logs, and the same variables, by path, afterwards."""
    logs = [each.fit(x, target, epochs=3, batch_size=8, shuffle=False, verbose=0, **kwargs) for each in (model, copy)]
    assert logs[0].history.keys() == logs[1].history.keys()
    for name, values in logs[0].history.items():
        np.testing.assert_allclose(logs[1].history[name], values, rtol=rtol, err_msg=name)
    got = {variable.path: variable.numpy() for variable in copy.variables}
    for variable in model.variables:
        want = variable.numpy()
        np.testing.assert_allclose(got[variable.path], want, atol=rtol * np.abs(want).max(), err_msg=variable.path)


def _fit_and_convert(model, **kwargs):
    """Trains and converts it without a warning; its copy, which does not share state with it."""
    model.fit(X, TARGET, epochs=3, batch_size=8, verbose=0, shuffle=False, **kwargs)
    before = [variable.numpy() for variable in model.optimizer.variables]
    copy = convert(model, verbose=0)
    assert type(copy.get_layer("second")) is tfops.keras.BatchNormalization
    assert copy.optimizer is not model.optimizer
    own = {id(each) for each in (*model.optimizer.variables, *model.metrics)}
    assert not own & {id(each) for each in (*copy.optimizer.variables, *copy.metrics)}
    for variable, value in zip(model.optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)  # the original's is as it was
    return copy


@keras.saving.register_keras_serializable(package="test")
class Lookahead(optimizers.Optimizer):
    """Wraps another, and has slots, a counter and a plain tf.Variable of its own."""

    def __init__(self, inner, every=2, **kwargs):
        super().__init__(learning_rate=0.0, **kwargs)
        self.inner, self.every = inner, every

    def build(self, variables):
        super().build(variables)
        self.inner.build(variables)
        self.slow = {self._var_key(v): self.add_variable_from_reference(v, "slow") for v in variables}
        self.calls = tf.Variable(0, trainable=False)

    def apply(self, grads, trainable_variables=None):
        variables = trainable_variables or self._trainable_variables
        if not self.built:
            self.build(variables)
        self.inner.apply(grads, variables)
        self.calls.assign_add(1)
        for variable in variables:
            slow = self.slow[self._var_key(variable)]
            mean = (slow + variable) / 2
            look = self.calls % self.every == 0
            slow.assign(tf.where(look, mean, slow))
            variable.assign(tf.where(look, mean, variable))

    def get_config(self):
        return {"inner": keras.saving.serialize_keras_object(self.inner), "every": self.every, "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("inner")), **config)


SCALE = 0.5  # for functions to refer to


def _rates():
    class Halving(optimizers.schedules.LearningRateSchedule):  # known to nobody by name
        def __call__(self, step):
            return 0.02 * SCALE ** tf.cast(step, tf.float64)

        def get_config(self):
            return {}

    return Halving()


def _multi():
    return optimizers.MultiOptimizer(
        optimizers.OptimizerMap(optimizers.Adam(0.01), {".*gamma": optimizers.SGD(0.01, momentum=0.9)})
    )


OPTIMIZERS = {
    "adam": lambda: optimizers.Adam(0.01),
    "ema": lambda: optimizers.SGD(0.01, momentum=0.9, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=4),
    "accumulates": lambda: optimizers.Adam(0.01, gradient_accumulation_steps=4, amsgrad=True),
    "factored": lambda: optimizers.Adafactor(0.01),
    "nadam": lambda: optimizers.Nadam(0.01),  # a variable of its own beside slots
    "schedule": lambda: optimizers.RMSprop(optimizers.schedules.ExponentialDecay(0.02, 3, 0.5)),
    "local_schedule": lambda: optimizers.RMSprop(_rates()),
    "lambda": lambda: optimizers.Adam(lambda: 0.02 * SCALE),
    "loss_scale": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01), dynamic_growth_steps=4),
    "wrapper": lambda: Lookahead(optimizers.Adam(0.01)),
    "wrapped_twice": lambda: optimizers.LossScaleOptimizer(Lookahead(optimizers.SGD(0.01, momentum=0.9)), 8.0),
    "multi": _multi,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on(name):
    if name == "multi" and not hasattr(optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")
    model = _model()
    model.compile(OPTIMIZERS[name](), "mse", run_eagerly=True)
    if name == "adam":
        model.optimizer.learning_rate = 0.03  # set after it was made
    copy = _fit_and_convert(model)
    assert type(copy.optimizer) is type(model.optimizer)
    _assert_trains_alike(model, copy)


def test_state_is_matched_by_variable_though_paths_are_the_same():
    def block(seed):
        return keras.Sequential([layers.Dense(4, kernel_initializer=keras.initializers.GlorotUniform(seed), name="d")])

    inputs = keras.Input((5,))
    blocks = [block(1), block(2)]
    for each in blocks:
        each.build((None, 5))
    y = layers.Add()(
        [layers.BatchNormalization(name="second")(each(inputs)) for each in blocks[:1]] + [blocks[1](inputs)]
    )
    model = keras.Model(inputs, layers.Dense(3)(layers.ReLU()(y)))
    for each in blocks:
        for variable in each.variables:
            variable._path = "same"
    model.compile(optimizers.Adam(0.01), "mse", run_eagerly=True)
    copy = _fit_and_convert(model)
    logs = [each.fit(X, TARGET, epochs=3, shuffle=False, verbose=0).history["loss"] for each in (model, copy)]
    np.testing.assert_allclose(*logs, rtol=1e-5)


def test_frozen_after_the_optimizer_was_built():
    model = _model()
    model.compile(optimizers.Adam(0.01), "mse", run_eagerly=True)
    model.fit(X, TARGET, verbose=0)
    model.get_layer("two").trainable = False
    copy = convert(model, verbose=0)
    for old, new in zip(model.optimizer.variables, copy.optimizer.variables, strict=True):
        np.testing.assert_array_equal(new, old)


def test_mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = _model("mixed_float16")
        model.compile(optimizers.Adam(0.01), "mse", run_eagerly=True)
    finally:
        keras.config.set_dtype_policy("float32")
    assert type(model.optimizer) is optimizers.LossScaleOptimizer
    copy = _fit_and_convert(model)
    assert type(copy.optimizer.inner_optimizer) is optimizers.Adam
    assert int(copy.optimizer.iterations) == int(model.optimizer.iterations) == 6
    slots = zip(model.optimizer.variables, copy.optimizer.variables, strict=True)
    assert all(np.array_equal(old, new) for old, new in slots)
    assert float(copy.optimizer.dynamic_scale) == float(model.optimizer.dynamic_scale)
    _assert_trains_alike(model, copy, rtol=2e-2)  # 2^-11, some steps


@pytest.mark.parametrize("scaled", [True, False])
def test_whether_the_loss_is_scaled_is_kept(scaled):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = _model("mixed_float16")
        model.compile("sgd", "mse", auto_scale_loss=scaled)
        copy = convert(model, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, optimizers.LossScaleOptimizer) == scaled
    assert type(copy.optimizer) is type(model.optimizer)


# ----------------------------------------------------------------------------------------------------------------------
# Losses, metrics and the rest


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


@pytest.mark.parametrize("name", COMPILED)
def test_losses_and_metrics(name):
    model = _two_outputs()
    model.compile(optimizers.SGD(0.01, momentum=0.9), **COMPILED[name], run_eagerly=True)
    targets, weights = {"left": TARGET, "right": 2 * TARGET}, np.linspace(0.5, 1.5, len(X))
    model.fit(X, targets, epochs=2, verbose=0)
    copy = convert(model, verbose=0)
    counters = {id(metric) for metric in model._compile_metrics.metrics} if "metrics" in COMPILED[name] else set()
    _assert_trains_alike(model, copy, target=targets, sample_weight=weights)
    assert not counters & {id(metric) for metric in copy.metrics}
    results = [each.evaluate(X, targets, sample_weight=weights, verbose=0, return_dict=True) for each in (model, copy)]
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        np.testing.assert_allclose(results[1][key], value, rtol=TOLERANCE, err_msg=key)


def test_metrics_of_the_copy_do_not_count_for_the_model():
    model = _model()
    model.compile("sgd", "mse", metrics=[Counted(1.0)], run_eagerly=True)
    copy = _fit_and_convert(model)
    before = model.get_metrics_result()["counted"]
    copy.evaluate(X, TARGET, batch_size=1, verbose=0)
    assert copy.get_metrics_result()["counted"] == 16
    assert model.get_metrics_result()["counted"] == before


@pytest.mark.parametrize(
    "options",
    [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}],
    ids=str,
)
def test_how_it_runs(options):
    model = _model()
    model.compile(optimizers.SGD(0.01), "mse", **options)
    copy = _fit_and_convert(model)
    for name in ("run_eagerly", "jit_compile", "steps_per_execution"):
        assert getattr(copy, name) == getattr(model, name), name
    _assert_trains_alike(model, copy)


def test_what_was_set_after_compiling():
    model = _model()
    model.compile("sgd", "mse")
    model.run_eagerly = True
    model.optimizer = optimizers.Adam(0.01)
    copy = convert(model, verbose=0)
    assert copy.run_eagerly
    assert type(copy.optimizer) is optimizers.Adam


def test_saved_and_loaded(tmp_path):
    model = _model()
    model.compile(optimizers.Adam(0.01), "mse", metrics=["mae"], run_eagerly=True)
    copy = _fit_and_convert(model)
    copy.save(tmp_path / "copy.keras")
    _assert_trains_alike(copy, keras.models.load_model(tmp_path / "copy.keras"))


def test_back():
    model = _model()
    model.compile(optimizers.Adam(0.01), "mse", metrics=["mae"], run_eagerly=True)
    back = convert(_fit_and_convert(model), to="keras", verbose=0)
    _assert_trains_alike(model, back)


def test_not_compiled_or_not_built():
    assert not convert(_model(), verbose=0).compiled
    model = keras.Sequential([layers.Dense(3, name="second"), layers.BatchNormalization(), layers.ReLU()])
    model.compile(optimizers.Adam(0.01), "mse", run_eagerly=True)
    copy = convert(model, verbose=0)
    assert copy.compiled
    assert not copy.optimizer.built
    copy.fit(X, TARGET, verbose=0)


def test_strategy():
    devices = tf.config.list_logical_devices("CPU")
    strategy = tf.distribute.MirroredStrategy([device.name for device in devices[:1]])
    with strategy.scope():
        model = _model()
        model.compile(optimizers.Adam(0.01), "mse", metrics=["mae"], run_eagerly=True)
        model.fit(X, TARGET, verbose=0)
        copy = convert(model, verbose=0)
    assert copy.optimizer._distribution_strategy is strategy
    _assert_trains_alike(model, copy)


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


def test_a_task_is_compiled_as_its_user_did():
    keras.utils.set_random_seed(0)
    model = Task()
    assert convert(model, verbose=0).loss == "mae"
    model.compile(optimizers.SGD(0.01, momentum=0.9), _closure(2), metrics=None, run_eagerly=True)
    copy = _fit_and_convert(model)
    assert copy.run_eagerly
    assert copy.metrics_names == model.metrics_names
    _assert_trains_alike(model, copy)
    model.compiled = False  # as after loading without it
    assert not convert(model, verbose=0).compiled


class WithMargin(Task):
    def compile(self, optimizer="sgd", loss="mse", margin=1.0, **kwargs):
        self.margin = margin
        super().compile(optimizer, loss, **kwargs)


class Stubborn(Task):
    def compile(self, optimizer="sgd", loss="mse", **kwargs):
        super().compile("rmsprop", loss, **kwargs)


class Narrow(Task):
    def compile(self, optimizer="sgd", loss="mse"):
        super().compile(optimizer, loss)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(WithMargin, r"\(margin\)"), (Stubborn, "replaces the optimizer"), (Narrow, "(?!.*auto_scale).*metrics")],
)
def test_a_compile_that_cannot_be_repeated(cls, reason):
    model = cls(name="net")
    model.compile(optimizers.Adam(0.01), "mae")
    with pytest.warns(
        UserWarning, match=rf"the copy of net is not compiled: {cls.__name__}\.compile\(\).*{reason}"
    ) as w:
        copy = convert(model, verbose=0)
    assert "copy.compile(...)" in str(w[0].message)
    assert "share paths" not in str(w[0].message)
    assert w[0].filename == __file__
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


def test_a_class_that_says_itself_how_it_is_compiled():
    model = _model(cls=TwoOptimizers)
    model.compile(optimizers.Adam(0.01), optimizers.SGD(0.01, momentum=0.9))
    model.fit(X, TARGET, epochs=3, batch_size=8, verbose=0)
    copy = convert(model, fold=False, verbose=0)
    assert int(copy.second.iterations) == 6
    _assert_trains_alike(model, copy)


class Unconfigured(optimizers.SGD):
    def __init__(self, factor):
        super().__init__(0.01 * factor)


class Sharing(Lookahead):
    def get_config(self):
        return {"inner": self.inner, "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def test_optimizers_that_cannot_be_copied():
    inner = optimizers.Adam(0.01)
    cases = [(Unconfigured(2), "factor|Unconfigured"), (Lookahead(inner), None)]
    if hasattr(optimizers, "MultiOptimizer"):
        cases.append((optimizers.MultiOptimizer(lambda variable: inner), "chooses optimizers by a function"))
    for optimizer, reason in cases:
        if reason is None:
            continue
        model = _model()
        model.compile(optimizer, "mse", run_eagerly=True)
        model.fit(X, TARGET, verbose=0)
        before = [variable.numpy() for variable in optimizer.variables]
        with pytest.warns(UserWarning, match=f"the copy of net is not compiled: .*({reason})"):
            copy = convert(model, verbose=0)
        assert not copy.compiled
        for variable, value in zip(optimizer.variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)


def test_an_optimizer_built_on_others_variables_begins_anew():
    model = _model()
    model.compile(optimizers.SGD(0.01, momentum=0.9), "mse", run_eagerly=True)
    other = keras.Variable(np.zeros(3), name="other")
    model.optimizer.build([*model.trainable_variables, other])
    with pytest.warns(UserWarning, match="its optimizer begins anew: it was built on other, which is not the model's"):
        copy = convert(model, verbose=0)
    assert copy.compiled
