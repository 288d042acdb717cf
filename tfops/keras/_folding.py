"""What the batch norms of a model's graphs can take in: the activation that follows, the addition, or both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import keras
from keras.src.models.functional import Functional

from tfops._activations import is_invertible
from tfops.keras._activations import activation_of, kind_of
from tfops.keras._attributes import held
from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._tags import still_to_come

CLASSES = keras.layers.BatchNormalization, BatchNormalization
# Keras' losses look for the sigmoid that has made probabilities, so as to compute from what it was given.
_LOGITS = "losses ask what the sigmoid was of"
_IN_PLACE = "it is in place, and has no inverse with what follows"
_NUMBERS = {0: "no", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


class Fold(NamedTuple):
    """What one call of a batch norm takes in; nothing, if `why` says so."""

    norm: keras.Layer
    call: Any  # a node of a graph, or an index into a Sequential's layers
    operations: tuple[Any, ...] = ()  # the layers and operations that follow and are folded in
    kinds: tuple[str, ...] = ()  # what these do: "add", an activation, or both
    why: str = ""  # a reason that batch norms have in common
    detail: str = ""  # what is particular to this one

    def without(self, why: str, detail: str = "") -> Fold:
        """The batch norm alone."""
        return Fold(self.norm, self.call, why=why, detail=detail)

    def with_(self, operation: Any, kind: str) -> Fold:
        return Fold(self.norm, self.call, (*self.operations, operation), (*self.kinds, kind))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(operation.name for operation in self.operations)


def is_graph(layer: Any) -> bool:
    """Whether the layer is a functional model, of whatever class, that computes what its graph says."""
    return isinstance(layer, Functional) and type(layer).call is Functional.call


def is_list(layer: Any) -> bool:
    return type(layer) is keras.Sequential


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layers in a layer; in a graph with those that are attached to it without being a part of it."""
    if isinstance(layer, keras.Sequential):
        return list(layer.layers)  # without the input layer, which it gets when it is built
    inside: list[keras.Layer] = layer._flatten_layers(include_self=False, recursive=False)
    if is_graph(layer):  # older Keras does not list them
        inside += [each for each in held(layer, keras.Layer) if not any(each is other for other in inside)]
    return inside


def nodes(model: keras.Model) -> list[Any]:
    """The calls that make up a functional model, in the order in which Keras makes them."""
    by_depth = model._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def leading(tensors: Iterable[keras.KerasTensor]) -> Iterator[Any]:
    """The calls that lead to symbolic tensors, in a graph or beside it."""
    tensors, seen = list(tensors), set()
    while tensors:
        operation, index, _ = tensors.pop()._keras_history
        node = operation._inbound_nodes[index] if operation is not None else None
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            tensors.extend(node.input_tensors)
            yield node


def nodes_as_made(model: keras.Model) -> Iterator[Any]:
    """The same in an order in which they can have been made: of each layer the first call first, as `output` is its."""
    waiting = nodes(model)
    inside = {id(node) for node in waiting}
    done: set[int] = set()
    while waiting:
        later = []
        for node in waiting:
            earlier = node.operation._inbound_nodes[: node.operation._inbound_nodes.index(node)]
            before = {id(each) for each in (*earlier, *node.parent_nodes)} & inside
            if before <= done:
                done.add(id(node))
                yield node
            else:
                later.append(node)
        waiting = later


def called(node: Any) -> list[Any]:
    """The layer or operation that is called, and the layers in it."""
    return node.operation._flatten_layers() if isinstance(node.operation, keras.Layer) else [node.operation]


def plan(model: keras.Model, to_fold: bool, merged: Collection[int] = ()) -> dict[int, list[Fold]]:
    """For each graph and Sequential in the model, by its id, what each call of a batch norm in it takes in.

    Args:
      merged: the ids of batch norms that take nothing in, because they will be no more.
    """
    parts = list(parts_of(model))
    shared = _Shared(filter(is_graph, parts))
    folds = {}
    for part in parts:
        look = _Graph(part, shared) if is_graph(part) else _List(part)
        # The last first: of two batch norms that are added, the later takes the addition in.
        calls = [Fold(look.layer(call), call) for call in reversed(look.calls) if type(look.layer(call)) in CLASSES]
        folds[id(part)] = [look.fold(each, to_fold and id(each.norm) not in merged) for each in calls]
    # The calls of a Sequential have no arguments: what is folded in there is a matter of the layer, at all its calls.
    of_norm = defaultdict(set)
    for part in parts:
        for fold in folds[id(part)]:
            of_norm[id(fold.norm)].add((is_list(part), fold.kinds))
    for part in filter(is_list, parts):
        alike = [len(of_norm[id(fold.norm)]) == 1 for fold in folds[id(part)]]
        folds[id(part)] = [
            fold if same else fold.without("its calls differ")
            for fold, same in zip(folds[id(part)], alike, strict=True)
        ]
    return folds


def parts_of(model: Any, seen: set[int] | None = None) -> Iterator[keras.Model]:
    """The model and those nested in it, once each, as far as they are graphs and Sequentials."""
    seen = set() if seen is None else seen
    if id(model) in seen or not (is_graph(model) or is_list(model)):
        return
    seen.add(id(model))
    yield model
    for layer in sublayers(model):
        yield from parts_of(layer, seen)
    if is_graph(model):
        for node in leading(held(model, keras.KerasTensor)):
            yield from parts_of(node.operation, seen)


def _obstacle(norm: keras.Layer) -> str:
    """Why a batch norm takes nothing in, whatever follows."""
    if norm.activity_regularizer is not None:
        return "it has an activity regularizer"
    return "it has an activation of its own" if getattr(norm, "activation", None) is not None else ""


def _needs_x(norm: keras.Layer, kind: str) -> bool:
    """Whether the batch norm keeps its result alone, and could not take in what follows."""
    return getattr(norm, "in_place", False) and (kind == "add" or not is_invertible(kind))


class _List:
    """A Sequential: each layer reads the one before."""

    def __init__(self, model: keras.Sequential):
        self._layers = model.layers
        self.calls = range(len(self._layers))

    def layer(self, call: int) -> keras.Layer:
        return self._layers[call]

    def fold(self, fold: Fold, to_fold: bool) -> Fold:
        if not to_fold or (why := _obstacle(fold.norm)):
            return fold.without(why if to_fold else "")
        if getattr(fold.norm, "folded", None) is not None:
            return fold.without("it has been folded before")
        call = fold.call + 1
        if call == len(self._layers):
            return fold.without("its result is an output")
        after = self._layers[call]
        activation = activation_of(after)
        if activation is None:
            return fold.without(*_no_activation(after))
        if after.compute_dtype != fold.norm.compute_dtype:
            return fold.without("the activation has another dtype", after.name)
        if _needs_x(fold.norm, activation):
            return fold.without(_IN_PLACE, after.name)
        if activation == "sigmoid" and call + 1 == len(self._layers):
            return fold.without(_LOGITS, after.name)
        return fold.with_(after, activation)


class _Shared:
    """What is known of all graphs of a model together: these may have calls in common."""

    def __init__(self, graphs: Iterable[keras.Model]):
        self.readers: dict[int, dict[int, Any]] = defaultdict(dict)  # the calls that read each symbolic tensor
        self.kept: set[int] = set()  # tensors that are outputs, or that are kept as attributes to be read
        self.taken: set[int] = set()  # additions
        self.folds: dict[int, Fold] = {}  # by the batch norm's call
        for graph in graphs:
            self.kept.update(map(id, held(graph, keras.KerasTensor)))
            for node in leading(held(graph, keras.KerasTensor)):
                for tensor in node.input_tensors:
                    self.readers[id(tensor)][id(node)] = node


class _Graph:
    """A functional model."""

    def __init__(self, model: keras.Model, shared: _Shared):
        self.calls = nodes(model)
        self._shared = shared
        self._place = {id(node): place for place, node in enumerate(self.calls)}
        # The calls in which each layer takes part, in itself or in a model that is called.
        self._calls_of: dict[int, list[Any]] = defaultdict(list)
        for node in self.calls:
            for layer in called(node):
                self._calls_of[id(layer)].append(node)

    def layer(self, call: Any) -> Any:
        return call.operation

    def fold(self, fold: Fold, to_fold: bool) -> Fold:
        if id(fold.call) not in self._shared.folds:
            why = _obstacle(fold.norm) if to_fold else ""
            self._shared.folds[id(fold.call)] = fold.without(why) if why or not to_fold else self._extend(fold)
        return self._shared.folds[id(fold.call)]

    def _extend(self, fold: Fold) -> Fold:
        node = fold.call
        if still_to_come(node.outputs[0]):
            return fold.without("it has been folded before")
        before = node.outputs[0]
        after, fold = self._reader(before, fold)
        if after is not None and kind_of(after.operation) == "Add":
            if _needs_x(fold.norm, "add"):
                return fold.without(_IN_PLACE, after.operation.name)
            fold = self._add(fold, after)
            if fold.kinds:
                self._shared.taken.add(id(after))
                before = after.outputs[0]
                after, _ = self._reader(before, fold)
        activation = None if after is None else activation_of(after.operation)
        if activation is not None and _needs_x(fold.norm, activation):
            return fold.without(_IN_PLACE, after.operation.name)
        if activation is not None and after.outputs[0].dtype != before.dtype:
            return fold if fold.kinds else fold.without("the activation has another dtype", after.operation.name)
        if activation == "sigmoid" and id(after.outputs[0]) in self._shared.kept:
            return fold if fold.kinds else fold.without(_LOGITS, after.operation.name)
        return fold if activation is None else fold.with_(after.operation, activation)

    def _reader(self, tensor: Any, fold: Fold) -> tuple[Any, Fold]:
        """The only call that reads the tensor, or None; and the fold, which says why there is nothing to take in."""
        readers = list(self._shared.readers[id(tensor)].values())
        if id(tensor) in self._shared.kept:
            return None, fold.without("its result is an output")
        if len(readers) != 1:
            names = ", ".join(name_of(node.operation) for node in readers)
            return None, fold.without(f"read by {_NUMBERS.get(len(readers), len(readers))} layers", names)
        return readers[0], fold.without(*_no_activation(readers[0].operation))

    def _add(self, fold: Fold, addition: Any) -> Fold:
        """With the addition of two tensors, of which one is what the batch norm gives."""
        name, tensor = addition.operation.name, fold.call.outputs[0]
        if "residual" in fold.call.arguments.kwargs:
            return fold.without("it has a residual already", name)
        if id(addition) in self._shared.taken:
            return fold.without("another batch norm takes the addition", name)
        if len(addition.input_tensors) != 2 or addition.input_tensors[0] is addition.input_tensors[1]:
            return fold.without("the addition is not of two tensors", name)
        one, other = addition.input_tensors
        if one.shape != other.shape:
            return fold.without("the addition broadcasts", f"{name} adds shapes {one.shape} and {other.shape}")
        if one.dtype != other.dtype or addition.outputs[0].dtype != tensor.dtype:
            return fold.without("the addition has another dtype", name)
        if fold.norm.compute_dtype != tensor.dtype or not is_float(fold.call.input_tensors[0]):
            return fold.without("its input is not of its dtype", name)
        # It will be called where the addition is. No other call of it may come in between.
        places = [self._place[id(node)] for node in self._calls_of[id(fold.norm)]]
        if any(self._place[id(fold.call)] < place < self._place[id(addition)] for place in places):
            return fold.without("its calls would be in another order", name)
        return fold.with_(addition.operation, "add")


def is_float(tensor: Any) -> bool:
    return "float" in keras.backend.standardize_dtype(tensor.dtype)


def _no_activation(operation: Any) -> tuple[str, str]:
    if type(operation).__module__.startswith("keras.src.layers.activations"):
        return "the activation is not one that can be folded in", name_of(operation)
    return "no activation follows", name_of(operation)


def name_of(operation: Any) -> str:
    return f"{operation.name} ({type(operation).__name__})"
