"""What the batch norms of a model's graphs can take in: the activation that follows, the addition, or both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src.models.functional import Functional, functional_like_constructor

from tfops.keras._batch_normalization import BatchNormalization

_FUNCTIONS = [
    (keras.activations.relu, "relu"),
    (keras.activations.relu6, "relu6"),
    (keras.activations.leaky_relu, "leaky_relu"),
    (keras.activations.silu, "silu"),
    (tf.nn.relu, "relu"),
    (tf.nn.relu6, "relu6"),
    (tf.nn.leaky_relu, "leaky_relu"),
    (tf.nn.silu, "silu"),
]


class Fold(NamedTuple):
    """What one call of a batch norm takes in; nothing, if `note` says why."""

    norm: keras.Layer
    calls: list[Any]  # that of the batch norm, then those folded in: nodes of a graph, or indices into a Sequential
    folded: list[str]  # the names of the layers and operations folded in
    activation: str | None
    addition: Any  # the node that adds, or None
    residual: Any  # what it adds: a tensor of the graph, or None
    note: str

    @property
    def kind(self) -> tuple[str | None, bool]:
        return self.activation, self.residual is not None

    def without(self, note: str) -> Fold:
        """The batch norm alone."""
        return Fold(self.norm, self.calls[:1], [], None, None, None, note)


def is_graph(layer: Any) -> bool:
    """Whether it is a functional model which its class can make from new inputs and outputs."""
    return isinstance(layer, Functional) and functional_like_constructor(type(layer))


def is_list(layer: Any) -> bool:
    return type(layer) is keras.Sequential


def nodes(model: keras.Model) -> list[Any]:
    """The calls that make up a functional model, each after those that it depends on."""
    by_depth = model._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def plan(model: keras.Model, to_fold: bool) -> dict[int, list[Fold]]:
    """For each graph and Sequential in the model, by its id, what each call of a batch norm in it takes in.

    A layer that is called several times takes in the same at all of its calls, or nothing.
    """
    folds = {id(part): list(_folds(part, part is model, to_fold)) for part in _parts(model, set())}
    kinds = defaultdict(set)
    for fold in [fold for part in folds.values() for fold in part]:
        kinds[id(fold.norm)].add(fold.kind)
    return {
        part: [fold if len(kinds[id(fold.norm)]) == 1 else fold.without("its calls differ") for fold in of_part]
        for part, of_part in folds.items()
    }


def _parts(model: Any, seen: set[int]) -> Iterator[keras.Model]:
    """The model and those nested in it, once each, as far as they are graphs and Sequentials."""
    if id(model) in seen or not (is_graph(model) or is_list(model)):
        return
    seen.add(id(model))
    yield model
    for layer in model.layers:
        yield from _parts(layer, seen)


def _folds(model: keras.Model, outermost: bool, to_fold: bool) -> Iterator[Fold]:
    look = _Graph(model, outermost) if is_graph(model) else _List(model)
    # The last first: of two batch norms that are added, the later takes the addition in, and remains the later.
    for call in reversed(look.calls):
        norm = look.layer(call)
        if not _is_norm(norm):
            continue
        fold = Fold(norm, [call], [], None, None, None, "")
        if not to_fold:
            yield fold
        elif norm.activity_regularizer is not None:
            yield fold.without("it has an activity regularizer")
        elif getattr(norm, "activation", None) is not None:
            yield fold.without("it has an activation")
        else:
            yield look.extend(fold)


def _is_norm(layer: Any) -> bool:
    return type(layer) in (keras.layers.BatchNormalization, BatchNormalization)


def _kind(operation: Any) -> str:
    """The class name of one of Keras' own layers or operations that has no loss of its own, else ""."""
    if getattr(operation, "activity_regularizer", None) is not None:
        return ""
    return type(operation).__name__ if type(operation).__module__.split(".")[0] == "keras" else ""


def activation_of(operation: Any) -> str | None:
    """tfops' name of the activation that a layer or operation applies; None if there is none."""
    kind = _kind(operation)
    if kind == "Activation":
        return next((name for function, name in _FUNCTIONS if function is operation.activation), None)
    if kind in ("Relu", "Relu6", "Silu"):
        return kind.lower()
    if kind in ("LeakyReLU", "LeakyRelu"):
        return "leaky_relu" if operation.negative_slope == 0.2 else None
    if kind == "ReLU" and operation.threshold == 0:
        bounds = operation.negative_slope, operation.max_value
        return {(0, None): "relu", (0, 6): "relu6", (0.2, None): "leaky_relu"}.get(bounds)
    return None


class _List:
    """A Sequential: each layer reads the one before."""

    def __init__(self, model: keras.Sequential):
        self._layers = model.layers
        self.calls = range(len(self._layers))

    def layer(self, call: int) -> keras.Layer:
        return self._layers[call]

    def extend(self, fold: Fold) -> Fold:
        call = fold.calls[0] + 1
        if call == len(self._layers):
            return fold.without("its result is the model's")
        after = self._layers[call]
        activation = activation_of(after)
        if activation is None or after.compute_dtype != fold.norm.compute_dtype:
            return fold.without(_read_by([after]))
        return fold._replace(calls=[*fold.calls, call], folded=[after.name], activation=activation)


class _Graph:
    """A functional model."""

    def __init__(self, model: keras.Model, outermost: bool):
        self.calls = nodes(model)
        self._readers: dict[int, list[Any]] = defaultdict(list)
        for node in self.calls:
            for tensor in node.input_tensors:
                self._readers[id(tensor)].append(node)
        self._outputs = {id(tensor) for tensor in model.outputs}
        # Losses and metrics are given by the names of the layers that make the outputs, where these are several.
        self._named_outputs = self._outputs if outermost and len(model.outputs) > 1 else set()
        self._taken: set[int] = set()  # additions

    def layer(self, call: Any) -> Any:
        return call.operation

    def extend(self, fold: Fold) -> Fold:
        node = fold.calls[0]
        if "residual" in node.arguments.kwargs or len(node.arguments.args) > 3:
            return fold.without("it has a residual")
        first = node.outputs[0]
        after, note = self._reader(first)
        if after is not None and _kind(after.operation) == "Add":
            residual, note = self._residual(after, first)
            if residual is not None:
                fold = self._take(fold, after)._replace(addition=after, residual=residual)
                self._taken.add(id(after))
                after, _ = self._reader(after.outputs[0])
        if after is not None and (activation := activation_of(after.operation)):
            if self._is_like(after.outputs[0], first):
                fold = self._take(fold, after)._replace(activation=activation)
            else:
                note = f"{after.operation.name} gives another dtype, or is an output and keeps its name"
        return fold if fold.folded else fold.without(note)

    def _take(self, fold: Fold, node: Any) -> Fold:
        return fold._replace(calls=[*fold.calls, node], folded=[*fold.folded, node.operation.name])

    def _reader(self, tensor: Any) -> tuple[Any, str]:
        """The only call that reads the tensor, or None and why there is none."""
        readers = self._readers[id(tensor)]
        if id(tensor) in self._outputs:
            return None, "its result is an output"
        note = _read_by([node.operation for node in readers])
        return (readers[0] if len(readers) == 1 else None), note

    def _residual(self, addition: Any, tensor: Any) -> tuple[Any, str]:
        """The other of the two tensors that are added, or None and why it cannot be a residual."""
        name = addition.operation.name
        if id(addition) in self._taken:
            return None, f"{name} is in another batch norm"
        if len(addition.input_tensors) != 2:
            return None, f"{name} does not add two tensors"
        residual = addition.input_tensors[1 if addition.input_tensors[0] is tensor else 0]
        if residual.shape != tensor.shape:
            return None, f"{name} adds shapes {tensor.shape} and {residual.shape}"
        if residual.dtype != tensor.dtype or not self._is_like(addition.outputs[0], tensor):
            return None, f"{name} adds other dtypes, or is an output and keeps its name"
        if _has_mask(tensor) or _has_mask(residual):
            return None, f"{name} joins masks"
        return residual, ""

    def _is_like(self, after: Any, before: Any) -> bool:
        """Whether one layer may make `after` in place of two: nothing but the values differs."""
        same = after.dtype == before.dtype and _has_mask(after) == _has_mask(before)
        return same and id(after) not in self._named_outputs


def _has_mask(tensor: Any) -> bool:
    return getattr(tensor, "_keras_mask", None) is not None


def _read_by(operations: list[Any]) -> str:
    names = [f"{operation.name} ({type(operation).__name__})" for operation in operations]
    return f"read by {', '.join(names)}" if names else "nothing reads its result"
