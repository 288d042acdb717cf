"""What a model has beside its graph: the attributes that its class, or whoever has it, has set."""

from __future__ import annotations

import copy
import numbers
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.saving.keras_saveable import KerasSaveable

from tfops.keras._batch_normalization import OWN_ARGUMENTS
from tfops.keras._remaking import SETTINGS, carry_settings

# What compile, fit and their like set; the copy is compiled apart.
_TRAINING = {
    *("optimizer", "loss", "compiled", "history", "stop_training", "stop_predicting", "stop_evaluating"),
    *("steps_per_execution", "train_function", "test_function", "predict_function", "_compile_config"),
    *("_compile_loss", "_compile_metrics", "_compiled_trainable_state", "_compute_loss_has_training_arg"),
    *("_eval_epoch_iterator", "_initial_epoch", "_jit_compile", "_loss_tracker", "_run_eagerly"),
}
# What is of the object alone, or follows from what it is made of.
_OWN = {
    *("built", "call_signature_parameters", "dtype", "input_spec", "name", "output_names", "supports_masking"),
    *("trainable",),
}
_FUSED = {"activation", "folded"}  # what a batch norm does beside, which a conversion may change


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


def carry_over(model: keras.Model, new: keras.Model, known: dict[int, Any], like: Callable[[Any], Any]) -> None:
    """Gives a copy the model's other attributes.

    Args:
      known: by the id of each layer, operation, variable and symbolic tensor, what it is in the copy.
      like: makes an optimizer or metric like a given one. What it makes becomes known.
    """
    carry_settings(model, new, has_config=False)
    # An optimizer of this name may also be an attribute that the class has for itself.
    training = _TRAINING if model.compiled else _TRAINING - {"optimizer"}
    for name, value in list(vars(model).items()):
        if name not in training and name not in vars(new) and not name.startswith("_self_"):
            value = _map(value, known, like)
            try:
                setattr(new, name, value)  # which tracks it
            except AttributeError:  # a property has the name
                vars(new)[name] = value


def carry_plain(layer: Any, new: Any, like: Any = None) -> None:
    """Gives what is made by a config the public attributes of plain values that its config did not hold.

    Args:
      like: what is in the state in which the config leaves such a layer; `new` itself if None.
    """
    left = vars(new if like is None else like)
    ours = _OWN | SETTINGS | _TRAINING
    if isinstance(layer, keras.layers.BatchNormalization):
        ours |= _FUSED if hasattr(new, "skip_nonfinite") else {*_FUSED, *OWN_ARGUMENTS}
    for name, value in list(vars(layer).items()):
        if name.startswith("_") or name in ours or hasattr(type(new), name) or not _is_plain(value):
            continue
        # What is plain in one and not in the other has been made on the way, as by a call.
        if name not in left or (_is_plain(left[name]) and left[name] != value):
            setattr(new, name, _map(value, {}, copy.copy))


def _is_plain(value: Any) -> bool:
    """Whether it is made of numbers, strings and None alone."""
    if isinstance(value, dict):
        return all(_is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (numbers.Number, str, bytes))


def _map(value: Any, known: dict[int, Any], like: Callable[[Any], Any]) -> Any:
    """A copy of a value in which all that is known is replaced; what cannot be copied is shared."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, (keras.optimizers.Optimizer, keras.metrics.Metric)):
        return known.setdefault(id(value), like(value))
    if isinstance(value, keras.KerasTensor):
        return value
    # Keras' lists and dictionaries know the layer that tracks them, which a deep copy would copy.
    if isinstance(value, dict):
        pairs = [(_map(key, known, like), _map(item, known, like)) for key, item in value.items()]
        return OrderedDict(pairs) if isinstance(value, OrderedDict) else dict(pairs)
    if isinstance(value, (list, set)):
        items = [_map(item, known, like) for item in value]
        return set(items) if isinstance(value, set) else items
    if isinstance(value, tuple):
        items = [_map(item, known, like) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    try:
        if isinstance(value, KerasSaveable):  # a loss, for instance
            return type(value).from_config(value.get_config())
        return copy.deepcopy(value, known)
    except Exception:
        return value
