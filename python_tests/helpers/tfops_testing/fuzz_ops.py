"""Fuzzes the ops: each of the cases of fuzz_cases gives what fuzz_oracle says, or one error that names what is wrong.

    make fuzz ARGS="--cases 100000 --seed 1 --first 0"

Most are called eagerly, some in a tf.function of unknown shapes, and some as an imported GraphDef, whose attributes may
also be of the wrong type, missing or unknown. Cases run in child processes: if one dies, it is known in which case.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import graph_pb2, node_def_pb2

from tfops._library import ops

from . import fuzz_oracle, kernel_cases
from .fuzz_cases import COUNTS, INPUTS, OUTPUTS, Call, draw, mask_row

PIECE = 5000  # cases of a child process
_TYPES = {"T": "x", "U": "scale"}


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _flat(inputs: dict[str, Any]) -> list[np.ndarray]:
    return [array for value in inputs.values() for array in (value if isinstance(value, list) else [value])]


def _map(function: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: [function(a) for a in v] if isinstance(v, list) else function(v) for n, v in inputs.items()}


def _tensor(array: np.ndarray, sliced: bool) -> tf.Tensor:
    """A tensor; perhaps one that begins in the middle of another's memory."""
    if not sliced or not 0 < array.ndim < 8 or not array.size:  # of more dimensions TensorFlow takes no slices
        return tf.constant(array)
    return tf.constant(np.concatenate([array, array]))[len(array) :]


def eager(call: Call, rng: np.random.Generator) -> list[np.ndarray]:
    tensors = _map(lambda a: _tensor(a, rng.random() < 0.3), call.inputs)
    before = [t.numpy().tobytes() for t in _flat(tensors)] if rng.random() < 0.1 else None
    outputs = getattr(ops, f"tfops_batch_norm_{_snake(call.op)}")(**tensors, **call.attributes)
    outputs = [o.numpy() for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]
    if before is not None:
        assert before == [t.numpy().tobytes() for t in _flat(tensors)], "an input has changed"
    return outputs


def function(call: Call, rng: np.random.Generator) -> list[np.ndarray]:
    """In a tf.function of shapes that are unknown, or known in part."""

    def spec(array: np.ndarray) -> tf.TensorSpec:
        shape = None if rng.random() < 0.5 else [None if rng.random() < 0.5 else s for s in array.shape]
        return tf.TensorSpec(shape, array.dtype)

    arrays = _flat(call.inputs)

    tf.get_logger().setLevel("ERROR")  # it warns of many functions

    @tf.function(input_signature=[spec(array) for array in arrays], autograph=False)
    def run(*tensors: tf.Tensor) -> Any:
        remaining = iter(tensors)
        inputs = _map(lambda _: next(remaining), call.inputs)
        return getattr(ops, f"tfops_batch_norm_{_snake(call.op)}")(**inputs, **call.attributes)

    outputs = run(*arrays)
    return [o.numpy() for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]


def _mutilate(node: node_def_pb2.NodeDef, rng: np.random.Generator) -> str | None:
    """Damages an attribute. Returns a pattern of what must be said, if anything."""
    name = str(rng.choice([a for a in node.attr if a != "U" or node.op != "Tfops>BatchNormMoments"]))
    how = rng.integers(4)
    if how == 0 and name in ("T", "U"):
        del node.attr[name]
    elif how == 1:
        node.attr["made_up"].i = 1  # of a later version, for all that TensorFlow knows: it says so, and goes on
        return None
    elif how == 2 and any(a.startswith("num_") for a in node.attr):
        name = str(rng.choice([a for a in node.attr if a.startswith("num_")]))
        node.attr[name].i = int(rng.choice([-1, -(2**40)]))
        return rf"{name}|negative|Length"
    else:
        node.attr[name].Clear()
        node.attr[name].list.f.append(1.0)
    return name


def imported(call: Call, rng: np.random.Generator) -> list[np.ndarray]:
    """As a GraphDef that never went through Python's checks."""
    graph_def = graph_pb2.GraphDef()
    graph_def.versions.producer = tf.version.GRAPH_DEF_VERSION
    node = node_def_pb2.NodeDef(name="op", op=f"Tfops>BatchNorm{call.op}")
    feed = {}
    for i, array in enumerate(_flat(call.inputs)):
        placeholder = graph_def.node.add(name=f"p{i}", op="Placeholder")
        placeholder.attr["dtype"].type = tf.as_dtype(array.dtype).as_datatype_enum
        if rng.random() < 0.5:
            placeholder.attr["shape"].shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
        else:
            placeholder.attr["shape"].shape.unknown_rank = True
        node.input.append(placeholder.name)
        feed[f"p{i}:0"] = array
    for name, like in _TYPES.items():
        if like in call.inputs:
            node.attr[name].type = tf.as_dtype(call.inputs[like].dtype).as_datatype_enum
    for name, value in call.attributes.items():
        if name == "U":
            node.attr[name].type = tf.as_dtype(value).as_datatype_enum
        elif isinstance(value, str):
            node.attr[name].s = value.encode()
        elif isinstance(value, bool):
            node.attr[name].b = value
        else:
            setattr(node.attr[name], "f" if isinstance(value, float) else "i", value)
    for name, attribute in COUNTS.items():
        if name in INPUTS[call.op]:
            node.attr[attribute].i = len(call.inputs[name])
    if rng.random() < 0.3 and (fault := _mutilate(node, rng)):
        call.faults.append(fault)
    graph_def.node.append(node)
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    with tf.compat.v1.Session(graph=graph) as session:
        return session.run([f"op:{i}" for i in range(len(OUTPUTS[call.op]))], feed)


def _check_mask(call: Call, reckoned: fuzz_oracle.Oracle, got: np.ndarray) -> None:
    if not call.needs_mask or not call.inputs["x"].size:
        assert got.shape == (0,), f"mask has shape {got.shape}"
        return
    rows, row = mask_row(call.inputs["x"].shape, call.attributes["axis"], call.virtual_batches)
    assert got.size == rows * ((row + 7) // 8), f"mask has {got.size} bytes"
    bits = np.unpackbits(got.reshape(rows, -1), axis=1, bitorder="little")
    assert not bits[:, row:].any(), "the mask has bits past the end of a row"
    want, sure = reckoned.mask()
    assert (bits[:, :row].reshape(want.shape) == want)[sure].all(), "mask"


def _check(call: Call, outputs: list[np.ndarray]) -> int:
    """Compares with the oracle. Returns how many elements were."""
    names = OUTPUTS[call.op]
    assert len(outputs) == len(names)
    reckoned = fuzz_oracle.reckon(call)
    expected = reckoned.results()
    compared = 0
    for name, got in zip(names, outputs, strict=True):
        if name in expected:
            dtype = call.dtype if name in ("y", "dx", "dresidual") else call.param
            assert got.dtype == kernel_cases.numpy_dtype(dtype), f"{name} is {got.dtype}"
            compared += reckoned.compare(name, got, expected[name], dtype)
        elif name == "mask":
            _check_mask(call, reckoned, got)
    return compared


def _settle(call: Call) -> None:
    """dy is 0 where rounding decides on which side of its kink an activation is."""
    if "dy" in call.inputs and call.activation and not call.faults:
        with np.errstate(all="ignore"):
            call.inputs["dy"][fuzz_oracle.reckon(call).near_kinks()] = 0


# What refuses a call: the op, or Python's checks in its stead where a graph is made.
_REFUSALS = (tf.errors.InvalidArgumentError, ValueError, TypeError)


def _call(call: Call, run: Any, rng: np.random.Generator) -> tuple[list[np.ndarray] | None, Exception | None]:
    """Outputs, or the error."""
    try:
        return run(call, rng), None
    except _REFUSALS as error:
        return None, error


def _faults(call: Call, run: Any) -> list[str]:
    """Patterns for what is wrong.

    While a graph is made, x's shape may not be known. Then other inputs tell what it should be, and where these do not
    agree, the blame falls on either.
    """
    x = call.inputs["x"]
    others = _flat({n: call.inputs[n] for n in ("dy", "residual") if n in call.inputs})
    disagree = any(re.search("must have|axis", fault) for fault in call.faults) or any(
        other.shape != x.shape for other in others
    )
    if run is not eager and disagree:
        return [*call.faults, r"\b\w+ must have|must be in"]
    return call.faults


def run_case(seed: int, number: int) -> str:
    """Runs a case and checks what comes of it; AssertionError if that is wrong. Returns a word for the statistics."""
    call = draw(seed, number)
    _settle(call)
    rng = np.random.default_rng([seed, number, 1])
    chosen = rng.random()
    run = eager if chosen < 0.95 else function if chosen < 0.965 else imported
    outputs, error = _call(call, run, rng)
    if error is not None:
        assert run is not eager or isinstance(error, tf.errors.InvalidArgumentError), repr(error)
        assert call.faults, f"refused, though nothing is wrong: {error}"
        assert any(re.search(fault, str(error)) for fault in _faults(call, run)), (
            f"does not name what is wrong: {error}"
        )
        return f"{run.__name__}: refused"
    assert not call.faults, "accepted"
    return f"{run.__name__}: {'compared' if _check(call, outputs) else 'nothing to compare'}"


def run_cases(seed: int, numbers: range, started: Any = None) -> Counter:
    """Runs cases; `started`: a shared integer that is told of each. Raises AssertionError, which names the case."""
    counts: Counter = Counter()
    for number in numbers:
        if started is not None:
            started.value = number
        try:
            counts[run_case(seed, number)] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}, {draw(seed, number)}: {error}") from error
    return counts


def _child(seed: int, numbers: range, started: Any, results: Any) -> None:
    try:
        results.put(run_cases(seed, numbers, started))
    except AssertionError as error:
        results.put(str(error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    start, counts, end = time.monotonic(), Counter(), arguments.first + arguments.cases
    pieces = [range(first, min(first + PIECE, end)) for first in range(arguments.first, end, PIECE)]
    running: dict[int, tuple[Any, Any, Any]] = {}
    while pieces or running:
        while pieces and len(running) < arguments.jobs:
            numbers = pieces.pop(0)
            started, results = spawn.Value("q", numbers.start), spawn.SimpleQueue()
            child = spawn.Process(target=_child, args=(arguments.seed, numbers, started, results), daemon=True)
            child.start()
            running[child.sentinel] = (child, started, results)
        for sentinel in multiprocessing.connection.wait(list(running)):
            child, started, results = running.pop(sentinel)
            child.join()
            if results.empty():
                print(f"died with {child.exitcode} in case {started.value}: {draw(arguments.seed, started.value)}")
                return 1
            result = results.get()
            if isinstance(result, str):
                print(result)
                return 1
            counts += result
    print(f"{counts.total()} cases of seed {arguments.seed} in {time.monotonic() - start:.0f} s: all as they should be")
    for outcome, count in sorted(counts.items()):
        print(f"  {count:7d} {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
