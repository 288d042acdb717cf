"""What passes between a batch norm and the stand-ins of the layers that were folded into it.

Where an activation follows a batch norm, the batch norm applies it, and the stand-in in the activation's place passes
the result on. Where an addition follows, its other summand is not there yet when the batch norm is called: the batch
norm passes its input on, and the stand-in in the addition's place calls it once more, with the residual. Each tells the
next by an attribute of the tensor, as Keras does for masks: nothing else connects them, so that configs, clones, parts
of models and layers called by hand need no special care. A tensor without the attribute is like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def tag_applied(x: Any, activation: str) -> Any:
    """Tells that the activation, which comes next, has been applied to the tensor."""
    x._tfops_applied = activation
    return x


def applied(x: Any) -> str | None:
    return getattr(x, "_tfops_applied", None)


def tag_pending(x: Any, rest: Callable[..., tf.Tensor]) -> Any:
    """A tensor that stands for `rest(residual=...)`, which the addition that comes next calls."""
    x = tf.identity(x)  # what is given may be read elsewhere
    x._tfops_pending = rest
    return x


def pending(x: Any) -> Callable[..., tf.Tensor] | None:
    return getattr(x, "_tfops_pending", None)


_WORDS = {"add": "the addition"}  # activations have names of their own


class _Readers(list[Any]):
    """The calls that read what a layer or operation gives; adding one fails where that is not computed for it.

    Keras adds a call here when it is made in a graph, whoever makes it: so clones in which another layer has taken the
    place of one that was folded in fail when they are made.
    """

    def append(self, node: Any) -> None:
        for tensor in node.input_tensors:
            if (rest := still_to_come(tensor)) and not _takes_in(node.operation, rest[0]):
                before, norm = tensor._keras_history.operation, _norm(tensor)
                raise ValueError(
                    f"{node.operation.name} ({type(node.operation).__name__}) cannot read the output of "
                    f"{before.name}, which is not computed: {_WORDS.get(rest[0], rest[0])} is folded into the batch "
                    f"norm {norm.name}, and a layer that does it must follow. To replace or leave out layers that "
                    "follow batch norms, do so in the model as it was, and convert it then; or take "
                    "tfops.keras.convert(..., fold=False)"
                )
        super().append(node)


class Guarded(keras.Operation):
    """A layer or operation of whose results a fold may change what they are.

    Its `input` and `output` raise where they are not computed, and so do calls in a graph that would read that.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.__dict__["_outbound_nodes"] = _Readers()  # Keras would track it if it were set

    def takes_in(self, kind: str) -> bool:
        """Whether it passes on what has been folded in: "add", or an activation."""
        return False

    @property
    def input(self) -> Any:
        return self._guarded(super().input)

    @property
    def output(self) -> Any:
        return self._guarded(super().output)

    def _guarded(self, tensors: Any) -> Any:
        # Keras counts an operation's outputs when it makes a model; that is no use of them.
        if sys._getframe(2).f_globals["__name__"] == "keras.src.ops.function":
            return tensors
        for tensor in tensors if isinstance(tensors, list) else [tensors]:
            if follows := folded_into(tensor)[1]:
                raise ValueError(
                    f"the output of {tensor._keras_history.operation.name} is not computed: {' and '.join(follows)} "
                    f"{'is' if len(follows) == 1 else 'are'} folded into the batch norm {_norm(tensor).name}. The "
                    f"output of {follows[-1]} is there; tfops.keras.convert(..., fold=False) keeps the others"
                )
        return tensors


def _takes_in(operation: Any, kind: str) -> bool:
    return isinstance(operation, Guarded) and operation.takes_in(kind)


def still_to_come(tensor: Any) -> list[str]:
    """What has been folded into the tensor, or will be, of the calls that follow: "add", an activation, or both."""
    operation, index, _ = tensor._keras_history
    if not isinstance(operation, Guarded):
        return []
    node = operation._inbound_nodes[index]
    if hasattr(operation, "folded"):  # a batch norm
        folded = node.arguments.kwargs.get("folded") or operation.folded
        return folded.split("+") if folded else []
    return next((rest[1:] for x in node.input_tensors if (rest := still_to_come(x))), [])


def folded_into(tensor: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is `still_to_come`, and the names of the layers and operations in whose place that is."""
    kinds, names = tuple(still_to_come(tensor)), []
    for _ in kinds:
        readers = tensor._keras_history.operation._outbound_nodes
        reader = next(node for node in readers if any(x is tensor for x in node.input_tensors))
        names.append(reader.operation.name)
        tensor = reader.outputs[0]
    return kinds, tuple(names)


def _norm(tensor: Any) -> Any:
    """The batch norm that something is folded into, at the tensor or before it."""
    operation, index, _ = tensor._keras_history
    if hasattr(operation, "folded"):
        return operation
    return next(_norm(x) for x in operation._inbound_nodes[index].input_tensors if still_to_come(x))
