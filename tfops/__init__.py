"""Fused batch normalization for TensorFlow and Keras.

    y, mean, variance = tfops.fused_batch_norm(x, scale, offset, activation="relu", residual=shortcut)
    layer = tfops.keras.BatchNormalization(activation="relu")
    model = tfops.keras.convert(model)

Importing registers the ops, so that saved models and graphs that hold them can be loaded.
"""

from tfops import _library, _xla, keras, reference  # noqa: F401  (_library is first: it says what is missing)
from tfops._batch_norm import fused_batch_norm
from tfops._info import build_info
from tfops_kernels import _build

__version__ = _build.VERSION

__all__ = ["__version__", "build_info", "fused_batch_norm", "keras", "reference"]
