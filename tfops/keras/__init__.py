"""Keras layers on the fused op."""

try:
    import keras as _keras  # noqa: F401
except ImportError as error:
    if error.name == "keras":
        raise
    raise ImportError(
        f"tfops needs Keras' TensorFlow backend, but Keras cannot be imported with the one that it is set to ({error}): "
        "set the environment variable KERAS_BACKEND=tensorflow before Keras is first imported"
    ) from error

from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._convert import convert

__all__ = ["BatchNormalization", "convert"]
