"""Recomputed for the gradient, the layer is what it is otherwise: `tf.recompute_grad` and `keras.RematScope`.

The oracle is Keras' layer, not recomputed. (Recomputed, that takes each batch into its moving statistics twice; and in
graphs it fails in a `RematScope` of any mode but "activations", because Keras calls it with keywords.)
"""

from __future__ import annotations

import contextlib
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops_testing.requirements import JIT, needs_remat_scope, needs_renorm

STOCK, FUSED = keras.layers.BatchNormalization, tfops.keras.BatchNormalization
rng = np.random.default_rng(0)
X, WEIGHTS, RESIDUAL = (tf.constant(rng.normal(1, 2, (6, 5, 4)), tf.float64) for _ in range(3))
MASK = tf.constant(rng.random((6, 5)) < 0.7)
ACTIVATIONS = {None: tf.identity, "relu": tf.nn.relu, "silu": tf.nn.silu}
SCOPES = {
    "full": {},
    "activations": {},
    "larger_than": {"output_size_threshold": 8},
    "list_of_layers": {"layer_names": ["norm"]},
}


def _layer(cls=tfops.keras.BatchNormalization, **kwargs):
    layer = cls(name="norm", dtype="float64", momentum=0.75, epsilon=2.0**-10, **kwargs)
    layer.build(X.shape)
    layer.gamma.assign([1.0, 2.0, 3.0, 4.0])
    return layer


def _step(layer, call, how):
    """y, the gradients of x, residual, gamma and beta, and all weights after a step."""

    def step(x, residual):
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            y = call(x, residual)
            loss = tf.reduce_sum(WEIGHTS * tf.sin(y))
        return y, *tape.gradient(loss, [x, residual, layer.gamma.value, layer.beta.value])

    if how != "eager":
        step = tf.function(step, jit_compile=how == "jit")
    return [*step(X, RESIDUAL), *layer.weights]


def _stock(activation, added=True, **kwargs):
    layer = _layer(keras.layers.BatchNormalization)

    def call(x, residual):
        y = layer(x, training=True, **kwargs)
        return ACTIVATIONS[activation](y + residual if added else y)

    return _step(layer, call, "eager")


def _assert_same(got, want):
    for result, value in zip(got, want, strict=True):
        if value is None:
            assert result is None
        else:
            np.testing.assert_allclose(result, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("how", ["eager", "function", JIT])
def test_recompute_grad_changes_no_result(how, activation):
    layer = _layer(activation=activation)
    call = tf.recompute_grad(lambda x, residual: layer(x, training=True, residual=residual))
    _assert_same(_step(layer, call, how), _stock(activation))


@needs_remat_scope
@pytest.mark.parametrize("mode", SCOPES)
@pytest.mark.parametrize("how", ["eager", "function", JIT])
def test_remat_scope_changes_no_result(how, mode):
    with keras.RematScope(mode, **SCOPES[mode]):
        layer = _layer(activation="silu")
        plain = _layer()
    _assert_same(_step(layer, lambda x, r: layer(x, training=True, residual=r), how), _stock("silu"))
    _assert_same(_step(plain, lambda x, _: plain(x, training=True), how), _stock(None, added=False))


@needs_remat_scope
@pytest.mark.parametrize("how", ["eager", "function"])
def test_remat_scope_changes_no_result_with_masks(how):
    with keras.RematScope("full"):
        layer = _layer(activation="relu")
    call = _step(layer, lambda x, r: layer(x, training=True, residual=r, mask=MASK), how)
    _assert_same(call, _stock("relu", mask=MASK))


@needs_renorm
@pytest.mark.parametrize("recomputed", [True, False])
def test_renorm_takes_a_batch_in_once(recomputed):
    layers = [_layer(cls, renorm=True) for cls in (keras.layers.BatchNormalization, tfops.keras.BatchNormalization)]
    stock, own = layers
    wrap = tf.recompute_grad if recomputed else lambda call: call
    want = _step(stock, lambda x, _: stock(x, training=True), "eager")
    got = _step(own, wrap(lambda x, _: own(x, training=True)), "eager")
    _assert_same(got[:1] + got[5:], want[:1] + want[5:])  # gradients are those of the corrections as recomputed


def test_recompute_grad_of_the_op_changes_no_gradient():
    scale, offset = tf.constant([1.0, 2.0, 3.0, 4.0], tf.float64), tf.zeros(4, tf.float64)

    def run(wrap):
        function = wrap(lambda *args: tfops.fused_batch_norm(*args, axis=-1, activation="silu")[0])
        with tf.GradientTape() as tape:
            tape.watch([X, scale, offset])
            loss = tf.reduce_sum(WEIGHTS * function(X, scale, offset))
        return tape.gradient(loss, [X, scale, offset])

    want = run(lambda function: function)
    for wrap in (tf.recompute_grad, lambda f: tf.function(tf.recompute_grad(f))):
        _assert_same(run(wrap), want)


def test_training_goes_on_after_a_recomputed_step():
    layer = _layer()
    call = tf.recompute_grad(lambda x, _: layer(x, training=True))
    stock = _layer(keras.layers.BatchNormalization)
    for _ in range(3):
        _step(layer, call, "eager")
        _step(stock, lambda x, _: stock(x, training=True), "eager")
        layer(2 * X, training=True)  # not recomputed
        stock(2 * X, training=True)
    _assert_same(layer.weights, stock.weights)


class _Block(keras.layers.Layer):
    """As the documentation of `keras.remat` has it: the layers inside are told nothing of `training`."""

    def __init__(self, norm, recomputed):
        super().__init__(name="block", dtype="float64")
        self.norm = norm
        self.inner = tf.recompute_grad(self.norm_of) if recomputed else self.norm_of

    def norm_of(self, x):
        return self.norm(x)

    def call(self, x, training=None):
        return self.inner(x)


@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("how", ["eager", "function", JIT])
def test_training_is_what_it_was(how, training):
    """Keras tells a layer by the call that is under way around it; there is none when the gradient is computed."""
    results = []
    for recomputed in (True, False):
        block = _Block(_layer(), recomputed)
        results.append(_step(block.norm, lambda x, _, block=block: block(x, training=training), how))
    _assert_same(*results)


@pytest.mark.parametrize("how", ["eager", "function"])
def test_masks_that_are_lost_are_named(how):
    """Those that Keras has attached to a tensor: the second time, tensors are others."""
    layer = _layer(activation="relu")
    attach = keras.layers.Masking(mask_value=0.0, dtype="float64")

    def gradient(x, by_name, recomputed):
        with tf.GradientTape() as tape:
            tape.watch(x)
            masked = attach(x)
            mask = masked._keras_mask if by_name else None
            call = (lambda x: layer(x, training=True, mask=mask)) if by_name else (lambda x: layer(x, training=True))
            loss = tf.reduce_sum((tf.recompute_grad(call) if recomputed else call)(masked) ** 2)
        return tape.gradient(loss, x)

    x = tf.where(MASK[..., None], X, 0.0)
    run = gradient if how == "eager" else tf.function(gradient)
    with pytest.raises(ValueError, match=r"the mask of norm is lost where it is recomputed .* layer\(x, mask=mask\)"):
        run(x, by_name=False, recomputed=True)
    want = gradient(x, by_name=False, recomputed=False)
    _assert_same([run(x, by_name=True, recomputed=True), run(x, by_name=False, recomputed=False)], [want, want])


def _warnings_of(step):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    return [str(each.message) for each in caught if "tf.recompute_grad" in str(each.message)]


@pytest.mark.parametrize("how", ["eager", "function"])
def test_of_functions_between_there_is_a_warning(how):
    layers = [_layer() for _ in range(4)]
    compiled = [tf.function(lambda x, _, layer=layer: layer(x, training=True)) for layer in layers]
    calls = [
        tf.recompute_grad(compiled[0]),
        tf.recompute_grad(compiled[1].python_function),
        tf.recompute_grad(lambda x, _: tf.cond(tf.reduce_all(x < 99), lambda: layers[2](x, training=True), lambda: x)),
        compiled[3],
    ]
    told = [_warnings_of(lambda pair=pair: _step(*pair, how)) for pair in zip(layers, calls, strict=True)]
    assert [len(each) for each in told] == [1, 0, 0, 0]
    assert "give it what the tf.function is made of, its python_function" in told[0][0]
    for layer in layers[1:3]:
        _assert_same(layer.weights, layers[3].weights)


@needs_remat_scope
@pytest.mark.parametrize("mode", SCOPES)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_remat_scope_changes_no_bit_under_mixed_policies(policy, mode):
    results = []
    for scope in (keras.RematScope(mode, **SCOPES[mode]), contextlib.nullcontext()):
        with scope:
            layer = tfops.keras.BatchNormalization(name="norm", dtype=policy, activation="relu", momentum=0.75)
        layer.build(X.shape)
        x, residual = tf.cast(X, layer.compute_dtype), tf.cast(RESIDUAL, layer.compute_dtype)

        @tf.function
        def step(layer=layer, x=x, residual=residual):
            with tf.GradientTape() as tape:
                tape.watch([x, residual])
                y = layer(x, training=True, residual=residual, mask=MASK)
                loss = tf.reduce_sum(tf.cast(y, tf.float32) ** 2)
            return y, *tape.gradient(loss, [x, residual, layer.gamma.value, layer.beta.value])

        results.append([tf.cast(each, tf.float32) for each in (*step(), *layer.weights)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)


@needs_remat_scope
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 3}], ids=str)
def test_accumulated_gradients_take_a_batch_in_once(options):
    models = []
    for cls, scope in ((FUSED, keras.RematScope("full")), (STOCK, contextlib.nullcontext())):
        with scope:
            norm = _layer(cls)
        model = keras.Sequential([keras.Input(X.shape[1:], dtype="float64"), norm])
        model.compile(keras.optimizers.SGD(0.1, **options), "mse")
        model.fit(X, WEIGHTS, batch_size=2, epochs=2, shuffle=False, verbose=0)
        models.append(model)
    _assert_same(models[0].weights, models[1].weights)


@needs_remat_scope
@pytest.mark.parametrize("models_too", [True, False])
def test_fit_in_a_remat_scope_agrees_with_keras(models_too):
    """With a nested model that is recomputed too, what is in it runs four times; Keras can do that eagerly alone."""

    def make(cls, scope, **kwargs):
        inputs = keras.Input(X.shape[1:], dtype="float64")
        with scope:
            norm = _layer(cls, **kwargs)
        with scope if models_too else contextlib.nullcontext():
            y = norm(inputs)
            return keras.Sequential([keras.Model(inputs, y if kwargs else keras.layers.ReLU(dtype="float64")(y))])

    fused = make(tfops.keras.BatchNormalization, keras.RematScope("full"), activation="relu")
    stock = make(keras.layers.BatchNormalization, contextlib.nullcontext())
    for model in (fused, stock):
        model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=models_too)
        model.fit(X, WEIGHTS, epochs=2, verbose=0)
    _assert_same(fused.weights, stock.weights)
