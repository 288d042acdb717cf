"""A converted model has an optimizer of its own, in the state of the original's, whatever kind that is."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from compiled_models import TARGET, X, assert_trains_alike, fit_and_convert, make_model
from keras import layers, optimizers

from tfops.keras import convert


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
def test_optimizers_go_on(name):
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


def test_frozen_after_the_optimizer_was_built():
    model = make_model()
    model.compile(optimizers.Adam(0.01), "mse", run_eagerly=True)
    model.fit(X, TARGET, verbose=0)
    model.get_layer("two").trainable = False
    copy = convert(model, verbose=0)
    for old, new in zip(model.optimizer.variables, copy.optimizer.variables, strict=True):
        np.testing.assert_array_equal(new, old)


def test_mixed_float16():
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
def test_optimizers_that_cannot_be_copied(name):
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
