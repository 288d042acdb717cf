"""A converted model has an optimizer of its own, in the state of the original's, whatever kind that is."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, optimizers

from tfops.keras import convert
from tfops_testing.compiled_models import TARGET, X, assert_trains_alike, fit_and_convert, make_model
from tfops_testing.requirements import needs_keras


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
    "schedule_later": lambda: optimizers.SGD(0.01, momentum=0.9),
    "local_schedule": lambda: optimizers.RMSprop(_rates()),
    "lambda": lambda: optimizers.Adam(lambda: 0.02 * SCALE),
    "loss_scale": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01), dynamic_growth_steps=4),
    "wrapper": lambda: Lookahead(optimizers.Adam(0.01)),
    "wrapped_twice": lambda: optimizers.LossScaleOptimizer(Lookahead(optimizers.SGD(0.01, momentum=0.9)), 8.0),
    "multi": _multi,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_keep_their_state(name):
    if name == "multi" and not hasattr(optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")
    model = make_model()
    model.compile(OPTIMIZERS[name](), "mse", run_eagerly=True)
    if name == "adam":
        model.optimizer.learning_rate = 0.03  # set after it was made
    if name == "schedule_later":
        model.fit(X, TARGET, verbose=0)
        model.optimizer.learning_rate = optimizers.schedules.ExponentialDecay(0.02, 3, 0.5)
    copy = fit_and_convert(model)
    assert type(copy.optimizer) is type(model.optimizer)
    assert_trains_alike(model, copy)


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
    copy = fit_and_convert(model)
    logs = [each.fit(X, TARGET, epochs=3, shuffle=False, verbose=0).history["loss"] for each in (model, copy)]
    np.testing.assert_allclose(*logs, rtol=1e-5)


def test_state_is_kept_of_layers_frozen_after_the_optimizer_was_built():
    model = make_model()
    model.compile(optimizers.Adam(0.01), "mse", run_eagerly=True)
    model.fit(X, TARGET, verbose=0)
    model.get_layer("two").trainable = False
    copy = convert(model, verbose=0)
    for old, new in zip(model.optimizer.variables, copy.optimizer.variables, strict=True):
        np.testing.assert_array_equal(new, old)


@needs_keras("3.9", "LossScaleOptimizer counts its iterations")
def test_loss_scaling_optimizer_keeps_its_state():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model("mixed_float16")
        model.compile(optimizers.Adam(0.01), "mse", run_eagerly=True)
    finally:
        keras.config.set_dtype_policy("float32")
    assert type(model.optimizer) is optimizers.LossScaleOptimizer
    copy = fit_and_convert(model)
    assert type(copy.optimizer.inner_optimizer) is optimizers.Adam
    assert int(copy.optimizer.iterations) == int(model.optimizer.iterations) == 3
    slots = zip(model.optimizer.variables, copy.optimizer.variables, strict=True)
    assert all(np.array_equal(old, new) for old, new in slots)
    assert float(copy.optimizer.dynamic_scale) == float(model.optimizer.dynamic_scale)
    assert_trains_alike(model, copy, rtol=2e-2)  # 2^-11, some steps


@pytest.mark.parametrize("scaled", [True, False])
def test_whether_the_loss_is_scaled_is_kept(scaled):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_model("mixed_float16")
        model.compile("sgd", "mse", auto_scale_loss=scaled)
        copy = convert(model, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, optimizers.LossScaleOptimizer) == scaled
    assert type(copy.optimizer) is type(model.optimizer)


class Unconfigured(optimizers.SGD):
    def __init__(self, factor):
        super().__init__(0.01 * factor)


class Sharing(Lookahead):
    def get_config(self):
        return {"held": [self.inner], "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(_HELD[0], name=config["name"])


_HELD = [optimizers.Adam(0.01)]
UNCOPYABLE = {
    "no config": (lambda: Unconfigured(2), "its Unconfigured cannot be copied by from_config"),
    "shared": (lambda: Sharing(_HELD[0], name="sharing"), "sharing and what is made by its from_config"),
    "function": (
        lambda: optimizers.MultiOptimizer(lambda variable: _HELD[0]),
        "multi_optimizer.* chooses optimizers by a function",
    ),
}


@pytest.mark.parametrize("name", UNCOPYABLE)
def test_optimizers_that_cannot_be_copied_leave_the_copy_uncompiled(name):
    make, reason = UNCOPYABLE[name]
    if name == "function" and not hasattr(optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")
    model = make_model()
    _HELD[0] = optimizers.Adam(0.01)
    model.compile(make(), "mse", run_eagerly=True)
    model.fit(X, TARGET, verbose=0)
    before = [variable.numpy() for variable in model.optimizer.variables]
    with pytest.warns(UserWarning, match=f"the copy of net is not compiled: {reason}"):
        copy = convert(model, verbose=0)
    assert not copy.compiled
    for variable, value in zip(model.optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_an_optimizer_built_on_others_variables_begins_anew():
    model = make_model()
    model.compile(optimizers.SGD(0.01, momentum=0.9), "mse", run_eagerly=True)
    other = keras.Variable(np.zeros(3), name="other")
    model.optimizer.build([*model.trainable_variables, other])
    with pytest.warns(UserWarning, match="its optimizer begins anew: it was built on other, which is not the model's"):
        copy = convert(model, verbose=0)
    assert copy.compiled


@pytest.mark.parametrize("by", ["names", "list"])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_excluded_from_weight_decay_stays_so(by, scaled):
    model = make_model()
    optimizer = optimizers.AdamW(0.01, weight_decay=5.0)
    chosen = [each for each in model.trainable_variables if each.name in ("gamma", "beta")]
    optimizer.exclude_from_weight_decay(**({"var_names": ["gamma", "beta"]} if by == "names" else {"var_list": chosen}))
    optimizer.purpose = "test"  # no config holds it
    model.compile(optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "mse", run_eagerly=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert(model, verbose=0)  # before it is trained
        copy = fit_and_convert(model)
    new = copy.optimizer.inner_optimizer if scaled else copy.optimizer
    assert int(new.iterations) == int(optimizer.iterations) > 0
    assert new.purpose == "test"
    uses = [new._use_weight_decay(each) for each in copy.trainable_variables]
    assert uses == [each.name not in ("gamma", "beta") for each in model.trainable_variables]
    assert_trains_alike(model, copy)


class Holding(keras.Model):
    """Trained by a loop of its user's own."""

    def __init__(self, **kwargs):
        inputs = keras.Input((4,))
        super().__init__(inputs, layers.ReLU()(layers.BatchNormalization()(inputs)), **kwargs)
        self.opt, self.met = optimizers.Adam(0.1), keras.metrics.Mean()
        self.more = {"all": [self.met, keras.metrics.Sum()], "sgd": optimizers.SGD(0.1, momentum=0.9)}


class HoldingInConfig(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.BatchNormalization()
        self.opt, self.met = optimizers.Adam(0.1), keras.metrics.Mean()
        self.more = {"all": [self.met, keras.metrics.Sum()], "sgd": optimizers.SGD(0.1, momentum=0.9)}

    def call(self, x, training=None):
        return self.norm(x, training=training)


@pytest.mark.parametrize("cls", [Holding, HoldingInConfig])
def test_optimizers_and_metrics_that_are_attributes_keep_their_state(cls):
    model = cls()
    model(np.ones((2, 4), "float32"))
    for each in (model.opt, model.more["sgd"]):
        each.apply([tf.ones(4)] * 2, model.trainable_variables)
    model.met.update_state(3.0)
    model.more["all"][1].update_state(4.0)
    copy = convert(model, verbose=0)
    assert copy.more["all"][0] is copy.met is not model.met
    assert (float(copy.met.result()), float(copy.more["all"][1].result())) == (3.0, 4.0)
    for old, new in ((model.opt, copy.opt), (model.more["sgd"], copy.more["sgd"])):
        assert new is not old
        for a, b in zip(old.variables, new.variables, strict=True):
            np.testing.assert_array_equal(b, a)
        new.apply([tf.ones(4)] * 2, copy.trainable_variables)


def test_optimizer_that_the_class_does_not_make_warns():
    model = HoldingInConfig()
    model(np.ones((2, 4), "float32"))
    model.later = optimizers.Adam(0.1)
    with pytest.warns(UserWarning, match="later of the copy of .* begins anew: what its copy has there is no Adam"):
        convert(model, verbose=0)
