"""Keras' layer on the fused op, what changes models, and what watches them train."""

try:
    import keras as _keras  # noqa: F401
except ImportError as error:
    if error.name == "keras":
        raise
    raise ImportError(
        f"tfops needs Keras' TensorFlow backend, but Keras is set to another, which it cannot import ({error}): set "
        "the environment variable KERAS_BACKEND=tensorflow before Keras is first imported"
    ) from error

from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._convert import convert
from tfops.keras._health import BatchNormFinding, BatchNormHealth
from tfops.keras._inference import fold

__all__ = ["BatchNormFinding", "BatchNormHealth", "BatchNormalization", "convert", "fold"]
