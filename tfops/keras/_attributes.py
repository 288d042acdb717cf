"""What a model has beside its graph: the attributes that its class, or whoever has it, has set."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.saving.keras_saveable import KerasSaveable

# What compile, fit and their like set; the copy is compiled apart.
_TRAINING = {
    *("optimizer", "loss", "compiled", "history", "stop_training", "stop_predicting", "stop_evaluating"),
    *("steps_per_execution", "train_function", "test_function", "predict_function", "_compile_config"),
    *("_compile_loss", "_compile_metrics", "_compiled_trainable_state", "_compute_loss_has_training_arg"),
    *("_eval_epoch_iterator", "_initial_epoch", "_jit_compile", "_loss_tracker", "_run_eagerly"),
}
# What Keras sets in every layer, but a class may set otherwise.
_SETTINGS = {
    *("_allow_non_tensor_positional_args", "_auto_config", "_call_context_args", "_call_has_context_arg"),
    *("_convert_input_args", "_dtype_policy", "_supports_masking", "activity_regularizer", "autocast", "supports_jit"),
    *("unrolled_steps_per_execution",),
}


def held(model: keras.Model, kind: type) -> Iterator[Any]:
    """The objects of a class that are attributes of the model, or in lists, tuples, sets and dictionaries that are."""
    values = list(vars(model).values())
    while values:
        value = values.pop()
        if isinstance(value, kind):
            yield value
        elif isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            values.extend(value)


def carry_over(model: keras.Model, new: keras.Model, known: dict[int, Any]) -> None:
    """Gives a copy the model's other attributes.

    Args:
      known: by the id of each layer, operation, variable and symbolic tensor, what it is in the copy.
    """
    for name in _SETTINGS & set(vars(model)):
        value = vars(model)[name]
        vars(new)[name] = value.copy() if isinstance(value, (dict, set)) else value
    known = {**known, id(model): new}
    for name, value in list(vars(model).items()):
        if name not in _TRAINING and name not in vars(new) and not name.startswith("_self_"):
            value = _map(value, known)
            try:
                setattr(new, name, value)  # which tracks it
            except AttributeError:  # a property has the name
                vars(new)[name] = value


def _map(value: Any, known: dict[int, Any]) -> Any:
    """A copy of a value in which all that is known is replaced; what cannot be copied is shared."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, keras.KerasTensor):
        return value
    # Keras' lists and dictionaries know the layer that tracks them, which a deep copy would copy.
    if isinstance(value, dict):
        pairs = [(_map(key, known), _map(item, known)) for key, item in value.items()]
        return OrderedDict(pairs) if isinstance(value, OrderedDict) else dict(pairs)
    if isinstance(value, (list, set)):
        items = [_map(item, known) for item in value]
        return set(items) if isinstance(value, set) else items
    if isinstance(value, tuple):
        items = [_map(item, known) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    try:
        if isinstance(value, KerasSaveable):  # a metric, a loss, an optimizer
            return type(value).from_config(value.get_config())
        return copy.deepcopy(value, known)
    except Exception:
        return value
