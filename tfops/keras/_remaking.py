"""Makes a layer, a model or an operation once more, from its config."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Collection
from typing import Any

import keras

# What Keras sets in every layer, but whoever makes the layer, or its class, may set otherwise.
_OF_LAYERS = ("autocast", "_supports_masking", "_convert_input_args", "_allow_non_tensor_positional_args")
_OF_CLASSES = ("supports_jit", "_call_context_args", "_call_has_context_arg")  # another class has its own
# What a config holds, or only models have: carried over where a copy is made without a config.
_OF_MODELS = ("_auto_config", "_dtype_policy", "activity_regularizer", "unrolled_steps_per_execution")
SETTINGS = {*_OF_LAYERS, *_OF_CLASSES, *_OF_MODELS}
_DEFAULTS = [keras.Layer.from_config.__func__, keras.Model.from_config.__func__]


class RemakeError(ValueError):
    """Says in a line why an object cannot be made from its config."""


def remake(layer: Any, cls: Any = None, without: Collection[str] = (), **options: Any) -> Any:
    """A new layer, model or operation of the same config.

    Args:
      cls: the class; the layer's own if None.
      without: what to leave out of the config.
      **options: what to put in the place of what the config says.

    Raises:
      RemakeError: that cannot be done.
    """
    functions = _functions(layer)
    try:
        return _remake(layer, cls or type(layer), without, {**functions, **options})
    except Exception as error:
        text = reason(error)
        if functions:
            names = ", ".join(f"{name}={function.__name__}" for name, function in functions.items())
            text = (
                f"it has plain functions ({names}), which a config cannot hold. Make them classes that are registered "
                f"by keras.saving.register_keras_serializable ({text})"
            )
        raise RemakeError(text) from error


def carry_settings(layer: keras.Layer, new: keras.Layer, has_config: bool = True) -> None:
    """Gives a copy of a layer the settings that its config does not hold; all if it was made without one."""
    names = SETTINGS.difference(_OF_MODELS if has_config else (), () if type(layer) is type(new) else _OF_CLASSES)
    for name in names:
        if name in vars(layer):
            value = vars(layer)[name]
            vars(new)[name] = value.copy() if isinstance(value, (dict, set)) else value


def _remake(layer: Any, cls: Any, without: Collection[str], options: dict[str, Any]) -> Any:
    if cls is keras.layers.Lambda:
        # Its config has the function's code, without what that refers to.
        return keras.layers.Lambda(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
    with warnings.catch_warnings():
        if options:  # a config has functions' code at best, and Keras warns of that
            warnings.simplefilter("ignore")
        config = layer.get_config()
    parameters = inspect.signature(cls.__init__).parameters.values()
    if cls.from_config.__func__ in _DEFAULTS and all(each.kind is not each.VAR_KEYWORD for each in parameters):
        # Keras puts these into every config, for classes too that do not take them.
        without = {*without, *({"name", "trainable", "dtype"} - {each.name for each in parameters})}
    new = cls.from_config({name: options.get(name, value) for name, value in config.items() if name not in without})
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
    text = " ".join(text.split("\n\n")[0].split()) or type(error).__name__
    if len(text) > 200:
        text = text[:200].rpartition(". ")[0] or text[:200].rpartition(" ")[0] + " .."
    return text.removesuffix(".")
