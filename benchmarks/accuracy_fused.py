"""Rows of accuracy.py: gradients of scale and offset where an activation, or an addition and one, follow in 16 bits.

Op by op, TensorFlow and Keras round the normalized numbers to 16 bits before the addition, and then the sum. Where that
is near 0, it comes out as 0 or with the other sign, and ReLU holds back whole elements that it should let through, or
lets through what it should not: both gradients are sums over all that it lets through. tfops rounds y alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SHAPE = (64, 56, 56, 24)
EPSILON = 2.0**-10
DTYPES = ("bfloat16", "float16")
VARIANTS = ("relu", "add_relu")
GRADIENTS = ("dscale", "doffset")

Array = np.ndarray


class Tensors(NamedTuple):
    x: Array
    dy: Array
    residual: Array
    scale: Array
    offset: Array


def make_tensors(dtype: str, shape: tuple[int, ...] = SHAPE) -> Tensors:
    rng = np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    tensors = (rng.standard_normal(shape, np.float32).astype(kind) for _ in range(3))
    return Tensors(*tensors, *(rng.uniform(low, 1.2, shape[-1]).astype(np.float32) for low in (0.8, -1)))


class Reference(NamedTuple):
    """Gradients by name in float64, and what tfops may be off by."""

    exact: dict[str, Array]
    bound: dict[str, Array]


def reference(t: Tensors, variant: str) -> Reference:
    x, dz, residual = (array.astype(np.float64).reshape(-1, array.shape[-1]) for array in t[:3])
    mean, std = x.mean(0), np.sqrt(x.var(0) + EPSILON)
    xhat = (x - mean) / std
    z = xhat * t.scale + t.offset + (residual if variant == "add_relu" else 0)
    dz = dz * (z > 0)
    sizes = np.abs(dz).sum(0), (np.abs(dz) * (1 + np.abs(xhat))).sum(0)
    eps = 2.0**-23
    bound = {"dscale": 8 * eps * (1 + np.abs(mean) / std) * sizes[1], "doffset": 8 * eps * sizes[0]}
    return Reference({"dscale": (dz * xhat).sum(0), "doffset": dz.sum(0)}, bound)


def step(peer: str, variant: str, dtype: str, channels: int) -> Callable[..., Any]:
    """A function of Tensors that returns dscale and doffset."""
    import keras
    import tensorflow as tf

    import tfops

    add = variant == "add_relu"
    layer = None
    if peer.startswith("keras"):
        layer = keras.layers.BatchNormalization(epsilon=EPSILON, dtype=f"mixed_{dtype}")
        layer.build([None, None, None, channels])

    def activated(x: Any, residual: Any, scale: Any, offset: Any) -> Any:
        if peer == "tfops":
            fused = {"activation": "relu", "residual": residual if add else None}
            return tfops.fused_batch_norm(x, scale, offset, epsilon=EPSILON, **fused)[0]
        if layer is not None:
            y = layer(x, training=True)
        else:
            y = tf.compat.v1.nn.fused_batch_norm(x, scale, offset, epsilon=EPSILON)[0]
        return tf.nn.relu(y + residual if add else y)

    @tf.function(autograph=False, jit_compile=peer.endswith("_jit"))
    def gradients(x: Any, dy: Any, residual: Any, scale: Any, offset: Any) -> Any:
        sources = [scale, offset]
        if layer is not None:
            layer.gamma.assign(scale)
            layer.beta.assign(offset)
            sources = [layer.gamma.value, layer.beta.value]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            y = activated(x, residual, scale, offset)
        return tape.gradient(y, sources, dy)

    return gradients


def study(device: str, dtypes: list[str], peers: list[str], rows: dict[str, Any]) -> None:
    """Adds rows whose errors are relative to the largest gradient of any channel."""
    import tensorflow as tf

    for dtype in (dtype for dtype in dtypes if dtype in DTYPES):
        t = make_tensors(dtype)
        for variant in VARIANTS:
            exact, bound = reference(t, variant)
            for peer in (peer for peer in peers if peer != "torch"):
                with tf.device(f"/{device.upper()}:0"):
                    found = step(peer, variant, dtype, SHAPE[-1])(*map(tf.constant, t))
                off = {name: np.abs(got.numpy() - exact[name]) for name, got in zip(GRADIENTS, found, strict=True)}
                case = f"fused, {variant}"
                key = f"{device} {dtype} NHWC {case} {peer}"
                rows[key] = {
                    "device": device,
                    "dtype": dtype,
                    "layout": "NHWC",
                    "case": case,
                    "peer": peer,
                    "ratio": None,
                    "errors": {name: float(f"{off[name].max() / np.abs(exact[name]).max():.3g}") for name in GRADIENTS},
                    "of_bound": {name: float(f"{(off[name] / bound[name]).max():.3g}") for name in GRADIENTS},
                }
                print(key, rows[key]["errors"], file=sys.stderr, flush=True)
