"""What cpu.py times: `cpu_peers.py tensorflow|tensorflow-eigen|torch|copy THREADS` is a process as in cpu_worker.py.

| peer | what is timed |
|---|---|
| tfops | the training and the inference op, the gradient op; forward + backward by the public function and a tape |
| tf_onednn | FusedBatchNormV3 and FusedBatchNormGradV3, then or before them tf.nn.relu, the addition and ReluGrad |
| tf_eigen | the same with oneDNN off |
| keras | keras.layers.BatchNormalization, the addition and tf.nn.relu in a tf.function; backward only with a tape |
| keras_jit | the same with jit_compile=True; several steps are a loop, for XLA would fuse them |
| torch | aten's native_batch_norm and its backward, add_ and relu_ in place, threshold_backward; no autograd |

Data of two dimensions are [N, 1, 1, C] to FusedBatchNormV3. NCHW are transposed for it and back: it has kernels for
NCHW, but they take longer. PyTorch has channels_last memory for NHWC, contiguous memory for NCHW.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cpu_worker import (
    EPSILON,
    MOMENTUM,
    NOISE,
    RESULTS,
    Call,
    CopyWorker,
    Tensors,
    Worker,
    before,
    chain,
    memory_shape,
    next_step,
    numbers,
    sample_indices,
    serve,
    steps_of,
)
from problems import Cell

LEAST_LOOP_STEPS = 4  # XLA copies a loop's initial values: fewer steps are not worth it

# ----------------------------------------------------------------------------------------------------------------------
# TensorFlow: a peer has a method for each pass, that takes tensors and what its forward pass saved.


class TfopsPeer:
    is_fast = True

    def __init__(self, cell: Cell):
        import tfops
        from tfops._library import ops

        self.function, self.ops = tfops.fused_batch_norm, ops
        self.add = cell.variant == "add_relu"
        self.activation = None if cell.variant == "plain" else "relu"
        self.common = {"axis": memory_shape(cell)[1], "epsilon": EPSILON, "activation": self.activation or ""}
        self.training = {"exponential_avg_factor": MOMENTUM, "unbiased": True}

    def forward(self, t: Tensors, saved: tuple = ()) -> tuple:
        running, residual = [t.mean, t.variance], [t.residual] if self.add else []
        options = {"running": running, "residual": residual, **self.common, **self.training}
        return tuple(self.ops.tfops_batch_norm_training(t.x, t.scale, t.offset, **options))

    def saved(self, results: tuple) -> tuple:
        return results[3:]

    def backward(self, t: Tensors, saved: tuple) -> tuple:
        options = {"drunning": [], "residual": [], "has_residual": self.add, **self.common, **self.training}
        return tuple(self.ops.tfops_batch_norm_training_grad(t.dy, t.x, t.scale, t.offset, *saved, **options))

    def inference(self, t: Tensors, saved: tuple = ()) -> tuple:
        residual = [t.residual] if self.add else []
        arguments = (t.x, t.scale, t.offset, t.mean, t.variance, residual)
        return (self.ops.tfops_batch_norm_inference(*arguments, **self.common),)

    def forward_backward(self, t: Tensors, saved: tuple = ()) -> tuple:
        import tensorflow as tf

        sources = [t.x, t.scale, t.offset, *([t.residual] if self.add else [])]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            y, *_ = self.function(
                *(t.x, t.scale, t.offset, t.mean, t.variance, EPSILON),
                exponential_avg_factor=MOMENTUM,
                axis=self.common["axis"],
                activation=self.activation,
                residual=t.residual if self.add else None,
            )
        return (y, *tape.gradient(y, sources, t.dy))


class FusedPeer:
    def __init__(self, cell: Cell, is_fast: bool = True):
        import tensorflow as tf

        self.is_fast = is_fast
        self.tf, self.shape = tf, memory_shape(cell)[0]
        self.add, self.relu = cell.variant == "add_relu", cell.variant != "plain"
        rank = len(cell.shape)
        self.data_format = "NDHWC" if rank == 5 else "NHWC"
        if rank == 2:
            self.to_op = partial(tf.reshape, shape=[cell.shape[0], 1, 1, cell.shape[1]])
            self.from_op = partial(tf.reshape, shape=cell.shape)
        elif cell.layout == "NCHW":
            self.to_op = partial(tf.transpose, perm=[0, *range(2, rank), 1])
            self.from_op = partial(tf.transpose, perm=[0, rank - 1, *range(1, rank - 1)])
        else:
            self.to_op = self.from_op = lambda tensor: tensor

    def _normalize(self, t: Tensors, training: bool) -> tuple:
        y, _, _, *saved = self.tf.raw_ops.FusedBatchNormV3(
            x=self.to_op(t.x),
            scale=t.scale,
            offset=t.offset,
            mean=t.mean,
            variance=t.variance,
            epsilon=EPSILON,
            exponential_avg_factor=MOMENTUM if training else 1.0,
            data_format=self.data_format,
            is_training=training,
        )
        y = self.from_op(y)
        y = y + t.residual if self.add else y
        return (self.tf.nn.relu(y) if self.relu else y), *saved

    def forward(self, t: Tensors, saved: tuple = ()) -> tuple:
        return self._normalize(t, True)

    def saved(self, results: tuple) -> tuple:
        return results if self.relu else results[1:]

    def backward(self, t: Tensors, saved: tuple) -> tuple:
        *y, mean, variance, more = saved
        dz = self.tf.raw_ops.ReluGrad(gradients=t.dy, features=y[0]) if self.relu else t.dy
        dx, dscale, doffset, _, _ = self.tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=self.to_op(dz),
            x=self.to_op(t.x),
            scale=t.scale,
            reserve_space_1=mean,
            reserve_space_2=variance,
            reserve_space_3=more,
            epsilon=EPSILON,
            data_format=self.data_format,
            is_training=True,
        )
        return (self.from_op(dx), dscale, doffset, *([dz] if self.add else []))

    def inference(self, t: Tensors, saved: tuple = ()) -> tuple:
        return self._normalize(t, False)[:1]

    def forward_backward(self, t: Tensors, saved: tuple = ()) -> tuple:
        results = self.forward(t)
        return (results[0], *self.backward(t, self.saved(results)))


class KerasPeer:
    is_fast = False

    def __init__(self, cell: Cell, t: Tensors):
        import keras
        import tensorflow as tf

        self.tf, self.add, self.relu = tf, cell.variant == "add_relu", cell.variant != "plain"
        shape, axis = memory_shape(cell)
        policy = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}.get(cell.dtype, cell.dtype)
        # Two layers, for training changes the moving statistics.
        self.training, self.inferring = (
            keras.layers.BatchNormalization(axis=axis, momentum=1 - MOMENTUM, epsilon=EPSILON, dtype=policy)
            for _ in range(2)
        )
        for layer in (self.training, self.inferring):
            layer.build(shape)
            variables = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
            for variable, value in zip(variables, (t.scale, t.offset, t.mean, t.variance), strict=True):
                variable.assign(value)

    def _apply(self, t: Tensors, training: bool) -> Any:
        y = self.training(t.x, training=True) if training else self.inferring(t.x, training=False)
        y = y + t.residual if self.add else y
        return self.tf.nn.relu(y) if self.relu else y

    def forward(self, t: Tensors, saved: tuple = ()) -> tuple:
        return (self._apply(t, True),)

    def inference(self, t: Tensors, saved: tuple = ()) -> tuple:
        return (self._apply(t, False),)

    def forward_backward(self, t: Tensors, saved: tuple = ()) -> tuple:
        sources = [t.x, self.training.gamma.value, self.training.beta.value, *([t.residual] if self.add else [])]
        with self.tf.GradientTape() as tape:
            tape.watch(sources)
            y = self._apply(t, True)
        return (y, *tape.gradient(y, sources, t.dy))


class TensorFlowWorker(Worker):
    def __init__(self, threads: int):
        super().__init__(threads)
        os.environ["KERAS_BACKEND"] = "tensorflow"
        import tensorflow as tf

        self.tf = tf
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self.eigen = os.environ["TF_ENABLE_ONEDNN_OPTS"] == "0"
        self.versions = {"tensorflow": tf.__version__, "keras": importlib.metadata.version("keras")}

    def tensors(self, cell: Cell) -> Tensors:
        tf = self.tf
        data = numbers(cell)
        shape, _ = memory_shape(cell)

        def fill(name: str) -> Any:
            noise = tf.cast(tf.constant(data[name]), cell.dtype)
            return tf.reshape(tf.tile(noise, [-(-cell.elements // NOISE)])[: cell.elements], shape)

        x = fill("x")
        residual = fill("residual") if cell.variant == "add_relu" else x
        vectors = [tf.constant(data[name]) for name in ("scale", "offset", "mean", "variance")]
        return Tensors(x, fill("dy"), residual, *vectors)

    def make_calls(self, cell: Cell, passes: list[str], only: str | None) -> tuple[dict, dict[str, str]]:
        t = self.tensors(cell)
        peers: dict[str, Any] = {}
        absent: dict[str, str] = {}
        if not self.eigen:
            peers["tfops"] = TfopsPeer(cell)
        fused = "tf_eigen" if self.eigen else "tf_onednn"
        if cell.dtype == "float64":
            absent[fused] = "FusedBatchNormV3 has no float64"
        else:
            peers[fused] = FusedPeer(cell, is_fast=not self.eigen)
        if not self.eigen:
            peers["keras"], peers["keras_jit"] = KerasPeer(cell, t), KerasPeer(cell, t)
        calls = {}
        for name, peer in peers.items():
            if only in (None, name):
                for what in passes:
                    if hasattr(peer, what):
                        calls[name, what] = self._call(cell._replace(what=what), name, peer, t)
        return calls, absent

    def concrete(self, function: Callable, arguments: list, jit: bool = False) -> Callable:
        specs = [self.tf.TensorSpec(value.shape, value.dtype) for value in arguments]
        function = self.tf.function(function, autograph=False, jit_compile=True if jit else None)
        return function.get_concrete_function(*specs)

    def _call(self, cell: Cell, name: str, peer: Any, t: Tensors) -> Call:
        what = cell.what
        saved = ()
        if what == "backward":
            saved = peer.saved(self.concrete(lambda *t: peer.forward(Tensors(*t)), [*t])(*t))
        jit = name == "keras_jit"
        steps = steps_of(cell, fast=jit or peer.is_fast)
        if jit and steps >= LEAST_LOOP_STEPS:
            return self._loop(cell, peer, t, steps)
        steps = 1 if jit else steps
        run, first = (self.graph(peer, what, count, t, saved, jit) for count in (steps, 1))
        return Call(run, steps, first)

    def graph(self, peer: Any, what: str, steps: int, t: Tensors, saved: tuple, jit: bool = False) -> Callable:
        """So many steps as a graph: a function without arguments, that returns what `chain` does."""

        def step(t: Tensors, saved: tuple) -> tuple:
            # Else all forward passes, which wait for y alone, may come before the first backward pass.
            with self.tf.control_dependencies([t.x, t.dy]):
                return getattr(peer, what)(t, saved)

        def graph(*arguments: Any) -> tuple:
            return chain(partial(step, saved=arguments[len(t) :]), what, steps, Tensors(*arguments[: len(t)]))

        return partial(self.concrete(graph, [*t, *saved], jit), *t, *saved)

    def _loop(self, cell: Cell, peer: Any, t: Tensors, steps: int) -> Call:
        tf, what = self.tf, cell.what
        count = len(RESULTS[what]) - (cell.variant != "add_relu" and "dresidual" in RESULTS[what])

        def graph(steps: Any, *arguments: Any) -> tuple:
            t = Tensors(*arguments)

            def body(i: Any, *results: Any) -> tuple:
                return (i + 1, *next_step(getattr(peer, what), what, t, results))

            return tf.while_loop(lambda i, *_: i < steps, body, (tf.constant(0), *before(what, t)[:count]))[1:]

        concrete = self.concrete(graph, [tf.constant(steps), *t], jit=True)
        return Call(partial(concrete, tf.constant(steps), *t), steps, partial(concrete, tf.constant(1), *t))

    def sample(self, cell: Cell, tensor: Any) -> np.ndarray:
        flat = self.tf.reshape(tensor, [-1])
        return self.tf.gather(flat, sample_indices(int(flat.shape[0]))).numpy().astype(np.float64)


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch


class TorchPeer:
    def __init__(self, torch: Any, cell: Cell):
        self.aten = torch.ops.aten
        self.add, self.relu = cell.variant == "add_relu", cell.variant != "plain"

    def _normalize(self, t: Tensors, training: bool) -> tuple:
        y, *saved = self.aten.native_batch_norm(t.x, t.scale, t.offset, t.mean, t.variance, training, MOMENTUM, EPSILON)
        if self.add:
            y.add_(t.residual)
        return (y.relu_() if self.relu else y), *saved

    def forward(self, t: Tensors, saved: tuple = ()) -> tuple:
        # The running statistics are updated in place: it gets its own.
        return self._normalize(t._replace(mean=t.mean.clone(), variance=t.variance.clone()), True)

    def inference(self, t: Tensors, saved: tuple = ()) -> tuple:
        return self._normalize(t, False)[:1]

    def backward(self, t: Tensors, saved: tuple) -> tuple:
        y, mean, inv_std = saved
        dz = self.aten.threshold_backward(t.dy, y, 0) if self.relu else t.dy
        statistics_ = (t.mean, t.variance, mean, inv_std)
        gradients = self.aten.native_batch_norm_backward(dz, t.x, t.scale, *statistics_, True, EPSILON, [True] * 3)
        return (*gradients, *([dz] if self.add else []))

    def forward_backward(self, t: Tensors, saved: tuple = ()) -> tuple:
        results = self.forward(t)
        return (results[0], *self.backward(t, results))


class TorchWorker(Worker):
    def __init__(self, threads: int):
        super().__init__(threads)
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.versions = {"torch": torch.__version__}

    def make_calls(self, cell: Cell, passes: list[str], only: str | None) -> tuple[dict, dict[str, str]]:
        torch = self.torch
        data = numbers(cell)
        shape, axis = memory_shape(cell)

        def fill(name: str) -> Any:
            noise = torch.from_numpy(data[name]).to(getattr(torch, cell.dtype))
            tensor = noise.repeat(-(-cell.elements // NOISE))[: cell.elements].clone().reshape(shape)
            return tensor.movedim(axis, 1)  # channels second, as PyTorch wants it; the memory stays

        x = fill("x")
        residual = fill("residual") if cell.variant == "add_relu" else x
        vectors = [torch.from_numpy(data[name]) for name in ("scale", "offset", "mean", "variance")]
        t = Tensors(x, fill("dy"), residual, *vectors)
        peer = TorchPeer(torch, cell)
        calls = {}
        for what in passes:
            steps = steps_of(cell._replace(what=what))
            step = getattr(peer, what)
            if what == "backward":
                try:
                    step = partial(step, saved=peer.forward(t))
                except RuntimeError as problem:
                    return calls, {"torch": str(problem).splitlines()[0]}
            calls["torch", what] = Call(partial(chain, step, what, steps, t), steps, partial(step, t))
        return calls, {}

    def sample(self, cell: Cell, tensor: Any) -> np.ndarray:
        _, axis = memory_shape(cell)
        flat = (tensor.movedim(1, axis) if tensor.dim() > 1 else tensor).reshape(-1)
        return flat[self.torch.from_numpy(sample_indices(flat.numel()))].double().numpy()


# ----------------------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    makers = {"tensorflow": TensorFlowWorker, "tensorflow-eigen": TensorFlowWorker, "torch": TorchWorker}
    serve({**makers, "copy": CopyWorker}[sys.argv[1]], int(sys.argv[2]))
