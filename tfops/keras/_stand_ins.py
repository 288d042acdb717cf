"""What stands in a converted model where an addition or an activation was that a batch norm has taken in.

The model keeps all its layers and operations, in their order and under their names: so weights files, checkpoints and
lists of weights fit, and what is read by its name is there. A stand-in knows what it stands for, and does that where
its input does not come from a batch norm that has done it already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfops.keras._activations import activation_of, kind_of
from tfops.keras._tags import Guarded, applied, pending, tag_applied


class _StandIn(Guarded):
    """What is common to layers and operations."""

    def _stand_for(self, original: Any) -> None:
        # In a closure, or Keras would track it, and look for its state.
        self._original: Callable[[], Any] = lambda: original

    def original(self) -> Any:
        """What it stands for."""
        return self._original()

    def takes_in(self, kind: str) -> bool:
        return kind == ("add" if kind_of(self.original()) == "Add" else activation_of(self.original()))

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        inputs = keras.tree.flatten((args, kwargs))
        for index, x in enumerate(inputs):
            if (rest := pending(x)) is not None:
                if not x.shape.is_compatible_with(inputs[1 - index].shape):
                    shapes = " and ".join(str(tuple(each.shape)) for each in inputs)
                    raise ValueError(
                        f"the addition {self.name} adds shapes {shapes}, but it is folded into a batch norm, which "
                        "cannot broadcast; tfops.keras.convert(..., fold=False) keeps the addition apart"
                    )
                y = rest(residual=inputs[1 - index])
                activation = applied(y)
                return _untagged(y) if activation is None else tag_applied(_untagged(y), activation)
            if applied(x) is not None and applied(x) == activation_of(self.original()):
                return _untagged(x)
        return self.original().call(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        return self.original().compute_output_spec(*args, **kwargs)

    def rematerialized_call(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = keras.tree.flatten((args, kwargs))
        if any(pending(x) is not None or applied(x) is not None for x in inputs):
            return fn  # which computes nothing, or calls the batch norm, which has a scope of its own
        return super().rematerialized_call(fn, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "original": keras.saving.serialize_keras_object(self.original())}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(keras.saving.deserialize_keras_object(config["original"]), name=config["name"])


def _untagged(x: tf.Tensor) -> tf.Tensor:
    """The same without tags and masks, which are those of this tensor alone."""
    return tf.identity(x)


@keras.saving.register_keras_serializable(package="tfops")
class FoldedLayer(_StandIn, keras.Layer):
    """Stands for an `Add`, or for a layer that is an activation."""

    def __init__(self, original: keras.Layer, name: str | None = None):
        super().__init__(name=name or original.name, dtype=original.dtype_policy, trainable=original.trainable)
        self._stand_for(original)
        self.autocast = original.autocast
        self.supports_masking = original.supports_masking

    def call(self, inputs: Any) -> Any:
        return self._compute(inputs)

    def build(self, input_shape: Any) -> None:
        self.original().build(input_shape)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.original().compute_output_shape(input_shape)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return self.original().compute_mask(inputs, previous_mask)


@keras.saving.register_keras_serializable(package="tfops")
class FoldedOperation(_StandIn, keras.Operation):
    """Stands for `x + y`, or for an operation that is an activation."""

    def __init__(self, original: keras.Operation, name: str | None = None):
        super().__init__(name=name or original.name)
        self._stand_for(original)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self._compute(*args, **kwargs)


def stand_in(original: Any) -> FoldedLayer | FoldedOperation:
    """For a layer a layer, for an operation an operation: Keras lists and tracks layers alone."""
    return (FoldedLayer if isinstance(original, keras.Layer) else FoldedOperation)(original)
