"""What TensorFlow's batch norm ops had to be patched for, tried on these: an answer or an error, and no crash."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tfops._library import ops

X = tf.random.stateless_normal([2, 3, 3, 4], [1, 2])
GOOD, EMPTY, SHORT, LONG = tf.ones([4]), tf.zeros([0]), tf.ones([1]), tf.ones([5])
VECTORS = ("scale", "offset", "mean", "variance")


def _training(x, scale, offset, mean, variance):
    # Statistics of which nothing is kept may be empty, but not these.
    return ops.tfops_batch_norm_training(x, scale, offset, [mean, variance], [], exponential_avg_factor=0.5)


def _training_grad(x, scale, offset, mean, variance):
    mask = tf.zeros([0], tf.uint8)
    return ops.tfops_batch_norm_training_grad(x, x, scale, offset, mean, variance, mask, [], [])


def _inference(x, *vectors):
    return [ops.tfops_batch_norm_inference(x, *vectors, [])]


def _inference_grad(x, *vectors):
    return ops.tfops_batch_norm_inference_grad(x, x, *vectors, [])


def _gradient_moments(x, *vectors):
    return ops.tfops_batch_norm_gradient_moments(x, x, *vectors, [])


def _gradient_normalize(x, *vectors):
    return ops.tfops_batch_norm_gradient_normalize(x, x, *vectors, *vectors[:2], [], [])


FORWARD = (_training, _inference)
GRADIENTS = (_training_grad, _inference_grad, _gradient_moments, _gradient_normalize)
# The training gradient's names for mean and variance.
NAMES = {_training_grad: ("saved_mean", "saved_inv_std")}


def _refuse(call, bad, which):
    vectors = [bad if name == which else GOOD for name in VECTORS]
    names = dict(zip(VECTORS, ("scale", "offset", *NAMES.get(call, ("mean", "variance"))), strict=True))
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{names[which]} must have shape \[4\], but it has"):
        call(X, *vectors)
    # The same where no shape is known before it runs.
    specs = [tf.TensorSpec(None)] * 5
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{names[which]} must have shape \[4\], but it has"):
        tf.function(lambda *inputs: call(*inputs), input_signature=specs, autograph=False)(X, *vectors)


@pytest.mark.parametrize("which", VECTORS)
@pytest.mark.parametrize("bad", [EMPTY, SHORT, LONG, tf.ones([]), tf.ones([4, 1])], ids=lambda t: str(t.shape))
@pytest.mark.parametrize("call", FORWARD, ids=lambda f: f.__name__)
def test_cve_2021_29583_parameters_of_another_length_are_refused(call, bad, which):
    """FusedBatchNorm read past the ends of scale, offset, mean and variance, and at null if they were empty."""
    _refuse(call, bad, which)


@pytest.mark.parametrize("shape", [(10, 10, 10, 0), (0, 10, 10, 0), (3, 0)], ids=str)
@pytest.mark.parametrize("call", [*FORWARD, *GRADIENTS], ids=lambda f: f.__name__)
def test_cve_2021_29555_no_channels(call, shape):
    """FusedBatchNorm divided by the number of channels."""
    for output in call(tf.zeros(shape), *[EMPTY] * 4):
        assert output.shape in (shape, (0,))


@pytest.mark.parametrize("which", VECTORS)
@pytest.mark.parametrize("bad", [EMPTY, SHORT, LONG], ids=lambda t: str(t.shape))
@pytest.mark.parametrize("call", GRADIENTS, ids=lambda f: f.__name__)
def test_cve_2021_41223_parameters_of_another_length_are_refused(call, bad, which):
    """FusedBatchNorm's kernels accessed the heap out of bounds for parameters that nobody had checked."""
    _refuse(call, bad, which)


@pytest.mark.parametrize("call", GRADIENTS, ids=lambda f: f.__name__)
def test_cve_2021_41223_gradients_of_another_shape_are_refused(call):
    for shape in ([2, 3, 3, 5], [2, 3, 4], [0, 3, 3, 4], [72], []):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"must have shape|must have rank|must be in"):
            call(tf.ones(shape), *[GOOD] * 3, SHORT)
        arguments = {"dy": tf.ones(shape), "x": X, "scale": GOOD, "offset": GOOD, "residual": []}
        arguments |= dict(zip(NAMES.get(call, ("mean", "variance")), (GOOD, GOOD), strict=True))
        arguments |= {"mask": tf.zeros([0], tf.uint8), "drunning": []} if call is _training_grad else {}
        arguments |= {"tilt": GOOD, "shift": GOOD, "keep": []} if call is _gradient_normalize else {}
        with pytest.raises(tf.errors.InvalidArgumentError, match="dy must have shape"):
            getattr(ops, f"tfops_batch_norm{call.__name__}")(**arguments)


@pytest.mark.parametrize("call", [*FORWARD, *GRADIENTS], ids=lambda f: f.__name__)
def test_cve_2021_29547_empty_parameters(call):
    """QuantizedBatchNormWithGlobalNormalization took the first element of parameters that had none."""
    for empty in itertools.product([False, True], repeat=4):
        if any(empty):
            with pytest.raises(tf.errors.InvalidArgumentError, match="must have shape"):
                call(X, *[EMPTY if e else GOOD for e in empty])


@pytest.mark.parametrize("shape", [(0, 3, 3, 4), (2, 0, 3, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("call", [*FORWARD, *GRADIENTS], ids=lambda f: f.__name__)
def test_cve_2021_29548_no_elements(call, shape):
    """QuantizedBatchNormWithGlobalNormalization divided by a number of elements that was zero."""
    for output in call(tf.zeros(shape), *[GOOD] * 4):
        assert np.isfinite(output.numpy()).all()
