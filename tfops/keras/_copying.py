"""Copies a Keras model, with batch norms of another class."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._folding import Fold, is_graph, is_list, nodes, plan


class Report(NamedTuple):
    """What became of a batch norm."""

    name: str
    kinds: list[str]  # of what was folded in, or unfolded
    text: str


class Copier:
    """One conversion of a model to batch norms of class `to`."""

    def __init__(self, model: keras.Model, to: type[keras.Layer], fold: bool):
        self._model = model
        self._to = to
        self._from = keras.layers.BatchNormalization if to is BatchNormalization else BatchNormalization
        self._folds = plan(model, fold and to is BatchNormalization)  # of each graph and Sequential
        self._of_norm: dict[int, list[Fold]] = defaultdict(list)  # the same, of each batch norm
        for each in [fold for part in self._folds.values() for fold in part]:
            self._of_norm[id(each.norm)].append(each)
        self._copies: dict[int, Any] = {}  # by the id of the layer or operation
        self._parts: dict[tuple[int, str], keras.Layer] = {}  # additions and activations of unfolded batch norms
        self._names = {layer.name for layer in model._flatten_layers()}
        self._pairs: dict[int, tuple[keras.Layer, keras.Layer]] = {}  # layers whose state has been copied

    def run(self) -> tuple[keras.Model, list[Report]]:
        with _constructing(self._from, self._to):
            copy = self._copy(self._model)
            self._transfer(self._model, copy)
        count, wanted = len(copy.variables), len(self._model.variables)
        if count != wanted:
            raise ValueError(
                f"cannot convert {_describe(self._model)}: its copy has {count} variables, not {wanted}. Layers have "
                "been added to it, removed, or shared, and its config does not tell"
            )
        reports = [self._report(layer) for layer, _ in self._pairs.values() if self._is_replaced(layer)]
        return copy, reports

    @property
    def variables(self) -> dict[int, Any]:
        """What became of each variable of the model, by its id."""
        return {
            id(variable): new
            for layer, copy in self._pairs.values()
            for variable, new in zip(_own_variables(layer), _own_variables(copy), strict=True)
        }

    # ------------------------------------------------------------------------------------------------------------------
    # Copies without state

    def _copy(self, layer: Any) -> Any:
        """The copy of a layer, model or operation: always the same one, so that what is shared stays so."""
        if id(layer) not in self._copies:
            self._copies[id(layer)] = self._make(layer)
        return self._copies[id(layer)]

    def _make(self, layer: Any) -> Any:
        if is_graph(layer):
            return self._make_graph(layer)
        if is_list(layer):
            return self._make_list(layer)
        if id(layer) in self._of_norm:
            return self._make_norm(layer)
        if type(layer) is keras.layers.Lambda:
            # Its config has the function's code, without what that refers to.
            return keras.layers.Lambda(
                layer.function,
                output_shape=layer._output_shape,
                mask=layer.mask,
                arguments=layer.arguments,
                name=layer.name,
                dtype=layer.dtype_policy,
            )
        try:
            copy = _remake(layer)
            copy.name = layer.name  # which the config may leave out
            return copy
        except Exception as error:
            raise ValueError(
                f"cannot convert {_describe(layer)}: it cannot be copied by from_config(get_config()), which its class "
                f"may have to override. {str(error).strip()}"
            ) from error

    def _make_norm(self, layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        activation = config.pop("activation", None)
        if self._to is BatchNormalization:
            config["activation"] = activation or self._of_norm[id(layer)][0].activation
        return self._to.from_config(config)

    def _make_list(self, model: keras.Sequential) -> keras.Sequential:
        # The input layer, if there is one, is not among model.layers.
        copies = [self._copy(each) for each in model._layers[:1] if isinstance(each, keras.layers.InputLayer)]
        left_out = {call for fold in self._folds[id(model)] for call in fold.calls[1:]}
        for call, layer in enumerate(model.layers):
            if call not in left_out:
                copies.append(self._copy(layer))
                if self._is_fused(layer):
                    copies.append(self._part(layer, layer.activation))
        copy = keras.Sequential(copies, name=model.name)
        copy._dtype_policy = model._dtype_policy  # its setter may quantize
        return copy

    def _make_graph(self, model: keras.Model) -> keras.Model:
        inputs = keras.tree.map_structure(lambda x: self._copy(x._keras_history.operation).output, model.input)
        pairs = zip(model.inputs, keras.tree.flatten(inputs), strict=True)
        tensors = {id(old): new for old, new in pairs}
        # A batch norm with an addition is called when that would be: all tensors are there then.
        sites = {id(fold.addition or fold.calls[0]): fold for fold in self._folds[id(model)]}
        folded = {id(call) for fold in sites.values() for call in fold.calls}
        for node in nodes(model):
            if fold := sites.get(id(node)):
                tensors[id(fold.calls[-1].outputs[0])] = self._call_norm(fold, tensors)
            elif id(node) not in folded:
                args, kwargs = node.arguments.fill_in(tensors)
                outputs = self._copy(node.operation)(*args, **kwargs)
                pairs = zip(node.outputs, keras.tree.flatten(outputs), strict=True)
                tensors.update((id(old), new) for old, new in pairs)
        outputs = keras.tree.map_structure(lambda x: tensors[id(x)], model.output)
        copy = type(model)(inputs, outputs, name=model.name)
        copy._dtype_policy = model._dtype_policy  # its setter may quantize
        return copy

    def _call_norm(self, fold: Fold, tensors: dict[int, Any]) -> Any:
        args, kwargs = fold.calls[0].arguments.fill_in(tensors)
        copy = self._copy(fold.norm)
        if self._to is BatchNormalization:
            if fold.residual is not None:
                kwargs["residual"] = tensors[id(fold.residual)]
            return copy(*args, **kwargs)
        arguments = inspect.signature(fold.norm.call).bind(*args, **kwargs).arguments
        residual = arguments.pop("residual", None)
        y = copy(arguments.pop("inputs"), **arguments)
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
            layer = keras.layers.Add(**options) if what == "add" else keras.layers.Activation(what, **options)
            self._parts[id(norm), what] = layer
        return self._parts[id(norm), what]

    # ------------------------------------------------------------------------------------------------------------------
    # State

    def _transfer(self, layer: keras.Layer, copy: keras.Layer) -> None:
        """Gives the copy, and all layers in it, the state of the layer and of those in it."""
        if id(layer) in self._pairs:
            return
        self._pairs[id(layer)] = layer, copy
        # What Keras has numbered is numbered as in the original, and named after the scopes that it was made in.
        copy.name, copy._path = layer.name, layer._path
        policy, new_policy = layer.dtype_policy.name, copy.dtype_policy.name
        if policy != new_policy and not isinstance(layer, keras.layers.InputLayer):
            raise ValueError(
                f"cannot convert {_describe(layer)}: its dtype policy is {policy}, but that of a copy is {new_policy}. "
                "Set the policy that the model was made with, or have its config tell"
            )
        if layer.built and not copy.built:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of models that cannot be built: the layers in them still can
                copy.build_from_config(layer.get_build_config())
        try:
            store: dict[str, Any] = {}
            layer.save_own_variables(store)
            copy.load_own_variables(store)
            if hasattr(layer, "save_assets"):
                with tempfile.TemporaryDirectory() as folder:
                    layer.save_assets(folder)
                    copy.load_assets(folder)
            pairs = list(zip(_own_variables(layer), _own_variables(copy), strict=True))
        except Exception as error:
            raise ValueError(f"cannot convert {_describe(layer)}: its copy does not take its state: {error}") from error
        for variable, new in pairs:
            new._path = variable.path
            new.trainable = variable.trainable
        for generator, new in zip(layer._seed_generators, copy._seed_generators, strict=True):
            new.state.assign(generator.state)
        # Its setter would set all sublayers'.
        copy._trainable = layer._trainable
        for sublayer, new in self._sublayers(layer, copy):
            self._transfer(sublayer, new)

    def _sublayers(self, layer: keras.Layer, copy: keras.Layer) -> Iterator[tuple[keras.Layer, keras.Layer]]:
        sublayers = _sublayers(layer)
        if id(layer) in self._folds:
            return ((each, self._copies[id(each)]) for each in sublayers if id(each) in self._copies)
        if len(sublayers) != len(_sublayers(copy)):
            raise ValueError(
                f"cannot convert {_describe(layer)}: it holds {len(sublayers)} layers, but its class makes "
                f"{len(_sublayers(copy))} when it is copied by from_config(get_config())"
            )
        return zip(sublayers, _sublayers(copy), strict=True)

    # ------------------------------------------------------------------------------------------------------------------
    # What is told

    def _is_replaced(self, layer: keras.Layer) -> bool:
        return type(layer) is self._from or any(fold.folded for fold in self._of_norm.get(id(layer), ()))

    def _report(self, layer: keras.Layer) -> Report:
        if self._to is not BatchNormalization:
            parts = {what: part.name for (norm, what), part in self._parts.items() if norm == id(layer)}
            return Report(layer.name, list(parts), ", ".join(parts.values()) or "nothing fused")
        if id(layer) not in self._of_norm:
            return Report(layer.name, [], "nothing: it is inside a subclassed model or layer")
        folds = self._of_norm[id(layer)]
        kinds = ["add"] if folds[0].addition else []
        kinds += [folds[0].activation] if folds[0].activation else []
        names = ", ".join(name for fold in folds for name in fold.folded)
        return Report(layer.name, kinds, f"{' and '.join(kinds)}: {names}" if kinds else f"nothing: {folds[0].note}")


def _describe(layer: Any) -> str:
    return f"{layer.name} ({type(layer).__name__})"


def _sublayers(layer: keras.Layer) -> list[keras.Layer]:
    if isinstance(layer, keras.Sequential):
        return layer.layers  # without the input layer, which it gets when it is built
    return layer._flatten_layers(include_self=False, recursive=False)


def _own_variables(layer: keras.Layer) -> list[Any]:
    return layer._trainable_variables + layer._non_trainable_variables


_DEFAULTS = [keras.Layer.from_config.__func__, keras.Model.from_config.__func__]


def _remake(layer: Any) -> Any:
    """A new layer, model or operation of the same class and config."""
    config = layer.get_config()
    parameters = inspect.signature(type(layer).__init__).parameters.values()
    if type(layer).from_config.__func__ in _DEFAULTS and all(each.kind is not each.VAR_KEYWORD for each in parameters):
        # Keras puts these into every config, for classes too that do not take them.
        ignored = {"name", "trainable", "dtype"} - {each.name for each in parameters}
        config = {name: value for name, value in config.items() if name not in ignored}
    return type(layer).from_config(config)


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
        return target(*args, **kwargs)

    with _lock:
        outer = vars(source).get("__new__")
        source.__new__ = new
        try:
            yield
        finally:
            if outer is None:
                del source.__new__
            else:
                source.__new__ = outer
