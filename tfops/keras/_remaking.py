"""Makes a layer, a model or an operation once more, from its config."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Collection
from typing import Any

import keras

_DEFAULTS = [keras.Layer.from_config.__func__, keras.Model.from_config.__func__]


def remake(layer: Any, cls: type | None = None, without: Collection[str] = ()) -> Any:
    """A new layer, model or operation of the same config.

    Args:
      cls: the class; the layer's own if None.
      without: what to leave out of the config.
    """
    cls = cls or type(layer)
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
    functions = _functions(layer)
    with warnings.catch_warnings():
        if functions:  # a config has their code at best, and Keras warns of that
            warnings.simplefilter("ignore")
        config = layer.get_config()
    parameters = inspect.signature(cls.__init__).parameters.values()
    if cls.from_config.__func__ in _DEFAULTS and all(each.kind is not each.VAR_KEYWORD for each in parameters):
        # Keras puts these into every config, for classes too that do not take them.
        ignored = {"name", "trainable", "dtype"} - {each.name for each in parameters}
        without = {*without, *ignored}
    config = {name: functions.get(name, value) for name, value in config.items() if name not in without}
    try:
        new = cls.from_config(config)
    except Exception as error:
        if functions:
            names = ", ".join(f"{name}={function.__name__}" for name, function in functions.items())
            raise ValueError(
                f"{reason(error)}. It has plain functions ({names}), which a config cannot hold: make them classes "
                "that are registered, as keras.saving.register_keras_serializable says"
            ) from error
        raise
    new.name = layer.name  # which the config may leave out
    return new


def _functions(layer: Any) -> dict[str, types.FunctionType]:
    """The attributes of the layer, and of those in it, that are functions of the user's own."""
    layers = layer._flatten_layers() if isinstance(layer, keras.Layer) else [layer]
    return {
        name: value
        for each in reversed(layers)
        for name, value in vars(each).items()
        if isinstance(value, types.FunctionType)
        and name not in ("build", "quantize")
        and value.__module__.split(".")[0] not in ("keras", "tensorflow", "tfops")
    }


def reason(error: Exception) -> str:
    """What an error says, in a line, without the configs and arrays that Keras puts into it."""
    text = str(error).strip()
    for announcement in ("Exception encountered: ", "Error encountered during deserialization: "):
        text = text.rpartition(announcement)[2]
    text = text.splitlines()[0] if text else type(error).__name__
    return (text if len(text) <= 200 else text[:200].rpartition(" ")[0] + " ...").rstrip(".")
