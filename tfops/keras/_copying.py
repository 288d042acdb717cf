"""Copies a Keras model, with batch norms of another class."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import keras
from keras.src.models.functional import Functional

from tfops.keras._activations import layer_of
from tfops.keras._attributes import carry_over, carry_plain, held
from tfops.keras._batch_normalization import OWN_ARGUMENTS, BatchNormalization
from tfops.keras._checking import same_calls, same_order, same_outputs, same_variables
from tfops.keras._compiling import make_like, transfer_states
from tfops.keras._folding import Fold, is_graph, is_list, nodes_as_made, plan, sublayers
from tfops.keras._remaking import RemakeError, carry_settings, reason, remake
from tfops.keras._reporting import Report, merged
from tfops.keras._stand_ins import FoldedLayer, FoldedOperation, stand_in
from tfops.keras._tags import folded_into


class Copier:
    """One conversion of a model to batch norms of class `to`.

    Attributes:
      variables: by the id of each variable of the model, that of the copy, once `run` is done.
    """

    _verb = "convert"

    def __init__(self, model: keras.Model, to: type[keras.Layer], fold: bool, merged: Collection[int] = ()):
        self.variables: dict[int, Any] = {}
        self._model = model
        self._to = to
        self._from = keras.layers.BatchNormalization if to is BatchNormalization else BatchNormalization
        self._unfolds = not fold or to is not BatchNormalization  # what has been folded in before
        self._folds = plan(model, fold and to is BatchNormalization, merged)  # of each graph and Sequential
        self._of_norm: dict[int, list[Fold]] = defaultdict(list)  # the same, of each batch norm
        for each in [fold for part in self._folds.values() for fold in part]:
            self._of_norm[id(each.norm)].append(each)
        self._taken = {id(each) for folds in self._folds.values() for fold in folds for each in fold.operations}
        self._originals: dict[int, Any] = {}  # layers and operations, by their ids
        self._copies: dict[int, Any] = {}  # by the id of the layer or operation
        self._calls: dict[int, Any] = {}  # by the id of the node
        self._tensors: dict[int, Any] = {}  # by the id of the symbolic tensor
        self._parts: dict[tuple[int, str], keras.Layer] = {}  # additions and activations of unfolded batch norms
        self._names = {layer.name for layer in model._flatten_layers()}
        self._pairs: dict[int, tuple[keras.Layer, keras.Layer]] = {}  # layers whose state has been copied

    def run(self) -> tuple[keras.Model, list[Report]]:
        with self._model.distribute_strategy.scope():
            with _constructing(self._from, self._to):
                copy = self._copy(self._model)
                for key, layer in list(self._originals.items()):
                    if isinstance(layer, keras.Layer):
                        self._transfer(layer, self._copies[key])
            self._carry_over()
            self._check(copy)
        return copy, [report for layer, _ in self._pairs.values() for report in self._reports(layer)]

    def _check(self, copy: keras.Model) -> None:
        self._check_variables(self._model.variables, copy.variables)
        if not self._parts and not same_order(self._model, self.variables, copy):
            self._refuse(self._model, "its copy has the weights in another order; files of weights would not fit")
        if problem := same_outputs(self._model, copy):
            self._refuse(
                self._model,
                f"{problem}. The config of a class must tell all that its instances are made with; if it does, "
                "convert(..., fold=False) may help",
            )

    def _check_variables(self, wanted: list[Any], got: list[Any]) -> None:
        if problem := same_variables(wanted, self.variables, got):
            self._refuse(
                self._model,
                f"{problem}. Layers have been added to it, removed, or shared, and its config does not tell",
            )

    def _refuse(self, layer: Any, problem: str, error: Exception | None = None) -> None:
        model, part = (f"{each.name} ({type(each).__name__})" for each in (self._model, layer))
        text = problem if layer is self._model else f"{part}: {problem}"
        raise ValueError(f"cannot {self._verb} {model}: {text}") from error

    # ------------------------------------------------------------------------------------------------------------------
    # Copies without state

    def _copy(self, layer: Any) -> Any:
        """The copy of a layer, model or operation: always the same one, so that what is shared stays so."""
        if id(layer) not in self._copies:
            copy = self._make(layer)
            _carry_remat_mode(layer, copy)
            if isinstance(layer, keras.Layer):
                _carry_settings(layer, copy)  # before the copy is called
            self._originals[id(layer)], self._copies[id(layer)] = layer, copy
        return self._copies[id(layer)]

    def _make(self, layer: Any) -> Any:
        if is_graph(layer):
            return self._make_graph(layer)
        if is_list(layer):
            return self._make_list(layer)
        if id(layer) in self._of_norm:
            own = () if self._to is BatchNormalization else OWN_ARGUMENTS
            return self._remake(layer, self._to, (*own, "folded") if self._unfolds else own)
        if id(layer) in self._taken:
            return stand_in(self._remake(layer))
        if isinstance(layer, (FoldedLayer, FoldedOperation)) and self._unfolds:
            return self._remake(layer.original())
        return self._remake(layer)

    def _remake(self, layer: Any, *args: Any, **options: Any) -> Any:
        try:
            return remake(layer, *args, **options)
        except RemakeError as error:
            self._refuse(
                layer,
                f"it cannot be copied by from_config(get_config()), which its class may have to override: {error}",
                error,
            )

    def _make_list(self, model: keras.Sequential) -> keras.Sequential:
        for fold in self._folds[id(model)]:
            if fold.kinds:
                self._copy(fold.norm).folded = fold.kinds[0]
        # The input layer, if there is one, is not among model.layers.
        copies = [self._copy(each) for each in model._layers[:1] if isinstance(each, keras.layers.InputLayer)]
        for layer in model.layers:
            copies.append(self._copy(layer))
            if self._is_fused(layer):
                copies.append(self._part(layer, layer.activation))
        return keras.Sequential(copies, name=model.name)

    def _make_graph(self, model: keras.Model) -> keras.Model:
        inputs = keras.tree.map_structure(lambda x: self._copy(x._keras_history.operation).output, model.input)
        self._tensors.update(zip(map(id, model.inputs), keras.tree.flatten(inputs), strict=True))
        folds = {id(fold.call): fold for fold in self._folds[id(model)]}
        for node in nodes_as_made(model):
            self._call(node, folds.get(id(node)))
        for tensor in held(model, keras.KerasTensor):
            self._reach(tensor)
        outputs = keras.tree.map_structure(lambda x: self._tensors[id(x)], model.output)
        # Without the constructor of its class, which would make a graph of its own.
        copy = Functional.__new__(type(model))
        Functional.__init__(copy, inputs, outputs, name=model.name)
        if name := same_calls(model, self._calls, copy):
            self._refuse(model, f"the calls of {name}, which has several, would come in another order")
        for each in own_variables(model):
            copy.add_weight(
                shape=each.shape,
                dtype=each.dtype,
                initializer="zeros",
                trainable=each.trainable,
                regularizer=each.regularizer,
                constraint=each.constraint,
                name=each.name,
            )
        return copy

    def _call(self, node: Any, fold: Fold | None = None) -> None:
        """Makes a call of a graph once more, or takes that which has been made for another graph."""
        if id(node) in self._calls:
            return
        args, kwargs = node.arguments.fill_in(self._tensors)
        copy = self._copy(node.operation)
        outputs = copy(*args, **kwargs) if fold is None else self._call_norm(fold, args, kwargs)
        self._tensors.update(zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=True))
        self._calls[id(node)] = copy._inbound_nodes[-1]

    def _reach(self, tensor: keras.KerasTensor) -> None:
        """Makes the calls that lead to a tensor which is no output, but an attribute."""
        operation, index, _ = tensor._keras_history
        if id(tensor) in self._tensors or operation is None:
            return
        node = operation._inbound_nodes[index]
        if node.is_input:
            self._tensors[id(tensor)] = self._copy(operation).output
            return
        for each in node.input_tensors:
            self._reach(each)
        self._call(node)

    def _call_norm(self, fold: Fold, args: Any, kwargs: dict[str, Any]) -> Any:
        copy = self._copy(fold.norm)
        if self._to is BatchNormalization:
            if self._unfolds:
                kwargs.pop("folded", None)
            return copy(*args, **kwargs, folded="+".join(fold.kinds)) if fold.kinds else copy(*args, **kwargs)
        arguments = inspect.signature(fold.norm.call).bind(*args, **kwargs).arguments
        arguments.pop("folded", None)  # what follows does that again
        residual = arguments.pop("residual", None)
        if (mask := arguments.pop("inputs_mask", None)) is not None:  # Keras before 3.10 keeps masks in its graphs
            arguments.setdefault("mask", mask)
        y = copy(**arguments) if "inputs" in kwargs else copy(arguments.pop("inputs"), **arguments)
        if residual is not None:
            y = self._part(fold.norm, "add")([residual, y])
        return self._part(fold.norm, fold.norm.activation)(y) if self._is_fused(fold.norm) else y

    def _is_fused(self, layer: Any) -> bool:
        """Whether the layer has an activation that its copy will not have."""
        return self._from is BatchNormalization and type(layer) is self._from and layer.activation is not None

    def _part(self, norm: keras.Layer, what: str) -> keras.Layer:
        """The layer that does apart what is fused in `norm`: "add", or an activation."""
        if (id(norm), what) not in self._parts:
            name = f"{norm.name}_{what}"
            while name in self._names:
                name += "_"
            self._names.add(name)
            options = {"name": name, "dtype": norm.dtype_policy}
            adds = what == "add"
            layer = keras.layers.Add(**options) if adds else layer_of(what, **options)
            self._parts[id(norm), what] = layer
        return self._parts[id(norm), what]

    # ------------------------------------------------------------------------------------------------------------------
    # State

    def _transfer(self, layer: keras.Layer, copy: keras.Layer) -> None:
        """Gives the copy, and all layers in it, the state of the layer and of those in it."""
        if id(layer) in self._pairs or layer is copy:
            return
        self._pairs[id(layer)] = layer, copy
        # What Keras has numbered is numbered as in the original, and named after the scopes that it was made in.
        copy.name, copy._path = layer.name, layer._path
        _carry_remat_mode(layer, copy)
        carry_settings(layer, copy)
        policy, new_policy = layer.dtype_policy.name, copy.dtype_policy.name
        carried = id(layer) in self._folds or isinstance(layer, keras.layers.InputLayer)
        if policy != new_policy and not carried:
            self._refuse(
                layer,
                f"its dtype policy is {policy}, but that of a copy is {new_policy}. "
                "Set the policy that the model was made with, or have its config tell",
            )
        if layer.built and not copy.built:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of models that cannot be built: the layers in them still can
                copy.build_from_config(layer.get_build_config())
        try:
            pairs = self._load(layer, copy)
        except Exception as error:
            self._refuse(
                layer, f"its copy does not take its state, as if its config did not tell all: {reason(error)}", error
            )
        for variable, new in pairs:
            _set_path(new, variable.path)
            new.trainable = variable.trainable
            self.variables[id(variable)] = new
        if not is_graph(layer):  # whose generators are attributes of an instance, which are copied last
            for generator, new in zip(layer._seed_generators, copy._seed_generators, strict=True):
                self._transfer_seed(generator, new)
        # Its setter would set all sublayers'.
        copy._trainable = layer._trainable
        for sublayer, new in self._sublayers(layer, copy):
            self._transfer(sublayer, new)

    def _load(self, layer: keras.Layer, copy: keras.Layer) -> list[tuple[Any, Any]]:
        """Gives the copy the layer's own state; pairs the variables of both."""
        store: dict[str, Any] = {}
        layer.save_own_variables(store)
        copy.load_own_variables(store)
        if hasattr(layer, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                layer.save_assets(folder)
                copy.load_assets(folder)
        return list(zip(own_variables(layer), own_variables(copy), strict=True))

    def _transfer_seed(self, generator: keras.random.SeedGenerator, copy: keras.random.SeedGenerator) -> None:
        copy.state.assign(generator.state)
        copy.name = generator.name
        _set_path(copy.state, generator.state.path)
        self.variables[id(generator.state)] = copy.state

    def _sublayers(self, layer: keras.Layer, copy: keras.Layer) -> Iterator[tuple[keras.Layer, keras.Layer]]:
        inside, made = sublayers(layer), sublayers(copy)
        if id(layer) in self._folds:
            return ((each, self._copy_or_share(each)) for each in inside)
        if len(inside) != len(made):
            self._refuse(
                layer,
                f"it holds {len(inside)} layers, but its class makes {len(made)} when it is copied by "
                "from_config(get_config()), which it may have to override",
            )
        return zip(inside, made, strict=True)

    def _copy_or_share(self, layer: keras.Layer) -> keras.Layer:
        """The copy of a layer; the layer itself if it has no state and cannot be copied."""
        try:
            return self._copy(layer)
        except ValueError:
            if layer.variables or any(isinstance(each, self._from) for each in layer._flatten_layers()):
                raise
            self._copies[id(layer)] = layer
            return layer

    def _carry_over(self) -> None:
        """Gives the copies what else the layers hold: in graphs and Sequentials all, in others what is plain."""
        problems: list[tuple[str, str]] = []

        def like(original: Any) -> Any:
            try:
                return make_like(original)
            except ValueError as error:
                problems.append((f"the copy of {self._model.name} has the same {original.name} as it", str(error)))
                return original

        known = {id(layer): copy for layer, copy in self._pairs.values()}
        known = {**self._copies, **self._tensors, **self.variables, **known}
        pairs = [(layer, copy) for layer, copy in self._pairs.values() if layer is not copy]
        for layer, copy in pairs:
            if id(layer) not in self._folds:
                self._carry_plain(layer, copy)
                continue
            for generator in layer._seed_generators:
                known[id(generator)] = keras.random.SeedGenerator.from_config(generator.get_config())
                self._transfer_seed(generator, known[id(generator)])
            carry_over(layer, copy, known, like)
            if is_graph(layer):  # weights are listed in this order, with the layers that are attached to the graph
                places = {id(known[id(each)]): place for place, each in enumerate(layer._layers)}
                ordered = sorted(copy._layers, key=lambda each: places.get(id(each), len(places)))
                if ordered != list(copy._layers):
                    copy._layers[:] = ordered
        for layer, copy in pairs:
            anew = transfer_states(layer, copy, self._model, self.variables)
            if not getattr(layer, "compiled", False):  # else its `compile` may be what makes them
                problems += [(f"{what} of the copy of {layer.name} begins anew", why) for what, why in anew]
        for what, why in problems:
            warnings.warn(f"{what}: {why}", stacklevel=4)  # where `convert` is called

    def _carry_plain(self, layer: keras.Layer, copy: keras.Layer) -> None:
        stands_in = isinstance(copy, FoldedLayer) and not isinstance(layer, FoldedLayer)
        carry_plain(layer, copy, copy.original() if stands_in else copy)

    # ------------------------------------------------------------------------------------------------------------------
    # What is told

    def _reports(self, layer: keras.Layer) -> Iterator[Report]:
        if not isinstance(layer, keras.layers.BatchNormalization):
            return
        folds = self._calls_of(layer)
        if type(layer) not in (keras.layers.BatchNormalization, BatchNormalization):
            if isinstance(layer, self._from):
                yield Report(layer.name, kept=type(layer).__name__)
        elif self._to is not BatchNormalization:
            if type(layer) is self._from:
                yield self._unfolded(layer)
        elif type(layer) is self._from or any(fold.kinds for fold in folds):
            calls = [Report(layer.name, fold.kinds, fold.names, fold.why, fold.detail) for fold in folds]
            yield merged(calls or [Report(layer.name, why="in a model or layer whose graph cannot be seen")])
        elif self._unfolds and id(layer) in self._of_norm and (report := self._unfolded(layer)).folds:
            yield report._replace(unfolded=True)

    def _calls_of(self, norm: keras.Layer) -> list[Fold]:
        """What each call of a batch norm takes in, the first call first; calls that graphs have in common once."""
        return list({id(fold.call): fold for fold in reversed(self._of_norm.get(id(norm), []))}.values())

    def _unfolded(self, layer: keras.Layer) -> Report:
        """What was folded into the layer or fused in it, and the names of the layers that do it now."""
        parts = {what: part.name for (norm, what), part in self._parts.items() if norm == id(layer)}
        nodes = [fold.call for fold in self._calls_of(layer) if not isinstance(fold.call, int)]
        calls = [folded_into(node.outputs[0]) for node in nodes or layer._inbound_nodes[:1]]
        if not any(kinds for kinds, _ in calls):
            calls = [((layer.folded,) if layer.folded else (), ())]
        return merged([Report(layer.name, (*parts, *kinds), (*parts.values(), *names)) for kinds, names in calls])


def own_variables(layer: keras.Layer) -> list[Any]:
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _set_path(variable: Any, path: str) -> None:
    setattr(variable, "_path" if hasattr(variable, "_path") else "path", path)  # a property from Keras 3.7 on


def _carry_remat_mode(layer: Any, copy: Any) -> None:
    """How `keras.RematScope` has it recomputed: an attribute of layers and, in newer Keras, of operations too."""
    if hasattr(layer, "_remat_mode"):
        copy._remat_mode = layer._remat_mode


def _carry_settings(layer: keras.Layer, copy: keras.Layer) -> None:
    """Also to the layers inside, as far as the copy has made them."""
    carry_settings(layer, copy)
    if is_graph(layer) or is_list(layer):
        return  # whose layers are copied one by one
    inside, made = sublayers(layer), sublayers(copy)
    if len(inside) == len(made):
        for each, new in zip(inside, made, strict=True):
            _carry_settings(each, new)


_lock = threading.RLock()  # a class may convert what it holds when it is copied


@contextlib.contextmanager
def _constructing(source: type[keras.Layer], target: type[keras.Layer]) -> Iterator[None]:
    """Within it, constructing `source` gives a `target`; classes derived from it stay what they are.

    It reaches every batch norm that a class makes for itself, whatever it is kept in, before it is tracked and built.
    """
    thread = threading.get_ident()

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is not source or threading.get_ident() != thread:
            return super(source, cls).__new__(cls, *args, **kwargs)
        if issubclass(target, source):
            return super(source, cls).__new__(target, *args, **kwargs)  # and Python calls target's __init__
        activation = kwargs.pop("activation", None)
        if activation is not None:
            raise ValueError(f"a batch norm inside it has the fused activation {activation!r}")
        for name in OWN_ARGUMENTS:
            kwargs.pop(name, None)
        return target(*args, **kwargs)

    with _lock:
        outer = vars(source).get("__new__")
        source.__new__ = new  # type: ignore[assignment]
        try:
            yield
        finally:
            if outer is None:
                del source.__new__
            else:
                source.__new__ = outer
