"""Keras layers on the fused op."""

from tfops.keras._batch_normalization import BatchNormalization

__all__ = ["BatchNormalization"]
