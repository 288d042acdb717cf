"""Keras layers on the fused op."""

from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._convert import convert

__all__ = ["BatchNormalization", "convert"]
