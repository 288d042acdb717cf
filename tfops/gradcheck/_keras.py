"""A Keras layer or model in float64, for difference quotients that are exact enough."""

from __future__ import annotations

from typing import Any

import keras

_NARROW = {"float16", "bfloat16", "float32", "mixed_float16", "mixed_bfloat16"}


def in_float64(layer: keras.Layer) -> keras.Layer | None:
    """A copy of a built layer that stores and computes in float64, with the same weights; None if there can be none.

    It is made from the layer's config, so a layer that has none, or another one than its config says, has no copy.
    """
    layers = [layer, *getattr(layer, "layers", [])]
    try:
        copy = keras.saving.deserialize_keras_object(
            _widened(keras.saving.serialize_keras_object(layer)),
            custom_objects={type(each).__name__: type(each) for each in layers},
            safe_mode=False,
        )
        pairs = list(zip(copy.variables, layer.variables, strict=True))
        for new, old in pairs:
            new.assign(keras.ops.cast(old.value, new.dtype))
    except Exception:
        return None
    floats = [new.dtype for new, _ in pairs if "float" in new.dtype]
    return copy if set(floats) <= {"float64"} else None


def _widened(config: Any) -> Any:
    """A config with float64 in place of every other floating type, and of every policy."""
    if isinstance(config, dict):
        return {
            key: "float64" if key in ("dtype", "name") and _is_narrow(key, value, config) else _widened(value)
            for key, value in config.items()
            if key != "compile_config"
        }
    return [_widened(each) for each in config] if isinstance(config, (list, tuple)) else config


def _is_narrow(key: str, value: Any, config: dict[str, Any]) -> bool:
    """Whether this is the name of a narrower type, or of the policy that is the whole config."""
    return isinstance(value, str) and value in _NARROW and (key == "dtype" or len(config) == 1)
