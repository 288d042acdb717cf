"""`tfops.keras.fold`: a model for inference, with batch norms in the weights of the layers beside them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfops.keras._activations import function_of
from tfops.keras._batch_normalization import BatchNormalization
from tfops.keras._checking import same_outputs
from tfops.keras._compiling import uncompile
from tfops.keras._convert import check_arguments
from tfops.keras._copying import Copier, own_variables
from tfops.keras._folding import CLASSES, Fold
from tfops.keras._merging import Merge, Merges, merged_weights
from tfops.keras._reporting import Report, describe_merged, merged

_WEIGHTS = ("kernel", "bias", "depthwise", "pointwise")
# What a layer is without whose weights are no longer trained; its kernel has the LoRA weights in it.
_WITHOUT = ["lora_rank", *(f"{weight}_{what}" for weight in _WEIGHTS for what in ("regularizer", "constraint"))]


def fold(model: keras.Model, *, verbose: int = 1) -> keras.Model:
    """A copy of a trained model for inference alone, with batch norms in the weights of the layers beside them.

    In inference a batch norm is y = scale x + offset, with scale = gamma / sqrt(moving_variance + epsilon) and
    offset = beta - scale moving_mean. Where x comes from a linear layer, or goes into one, that layer can do it:

        scale (K x + b) + offset = (scale K) x + (scale b + offset)
        K (scale x + offset) + b = (K scale) x + (K offset + b)

    So a batch norm, of Keras' class or tfops', goes into a Dense, Conv1D, Conv2D, Conv3D, DepthwiseConv1D,
    DepthwiseConv2D, SeparableConv1D, SeparableConv2D or Conv1DTranspose, Conv2DTranspose, Conv3DTranspose

    - before it, if that has no activation, and nothing but the batch norm reads its output;
    - or else after it, if nothing else reads what the batch norm gives, and the layer pads nothing: Dense, and
      convolutions that are not transposed, with padding "valid" or kernels of size 1.

    The layer has got a bias then, if it had none, and the activation that the batch norm had. The layers that follow
    stay what they are. Weights are computed in float64, and rounded to the layer's dtype at the end. In the place of
    the batch norm stands a `keras.layers.Identity` of its name, which computes nothing. What remains of a batch norm
    with a residual is an `Add`, and an `Activation` if it had one; their names are the batch norm's with "_add" and,
    for instance, "_relu".

    The other batch norms are replaced as by `tfops.keras.convert`, with what follows them folded in. They are those
    whose graph cannot be seen (in subclassed models and layers), that are called several times or with training=True,
    or that have no such layer beside them. If there are none, the copy is of Keras' layers alone: it can be exported,
    compiled by XLA, and converted to TFLite or ONNX as any model of these.

    **For inference alone.** The given model is left as it is: keep it, for training. The copy has other weights, which
    no weights file of the model fits. It is not compiled, `trainable` is False, and the layers that have taken a batch
    norm in are without regularizers and constraints of their weights. Compile it with a loss and metrics to evaluate
    it. Save or export the copy; but a model of a class that has a config of its own cannot be loaded once it is folded,
    since that config makes batch norms. Models and layers are copied as by `convert`, and the copy's outputs in
    inference are compared with the model's on random inputs of one element.

    Args:
        model: Any Keras model.
        verbose: 0 prints nothing. 1 prints a line that says how many batch norms were folded into weights, how many
            were kept, and why. 2 prints also a line for each of them, with names.

    Returns:
        A model of the same class.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: `verbose` is none of the above; a layer or the model cannot be copied by its config; the copy has
            other variables or other outputs, because the config does not tell all.

    Examples:
        >>> import keras
        >>> import tfops
        >>> inputs = keras.Input([8, 8, 16])
        >>> y = keras.layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv")(inputs)
        >>> y = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(name="norm")(y))
        >>> model = keras.Model(inputs, y, name="net")
        >>> served = tfops.keras.fold(model, verbose=2)
        net: 1 batch norm: 1 folded into weights
          norm  folded into conv
        >>> [type(layer).__name__ for layer in served.layers]
        ['InputLayer', 'Conv2D', 'Identity', 'ReLU']
    """
    check_arguments(model, verbose)
    apart = model
    if any(isinstance(layer, BatchNormalization) for layer in model._flatten_layers()):
        apart, _ = Copier(model, BatchNormalization, fold=False).run()  # takes out what convert has folded in
    folder = _Folder(apart)
    copy, reports = folder.run()
    if copy.compiled:  # by its class' constructor
        uncompile(copy)
    folder.freeze(copy)
    if verbose:
        print(describe_merged(model.name, reports, verbose > 1))
    return copy


class _Folder(Copier):
    """Copies a model in which nothing is folded."""

    _verb = "fold"

    def __init__(self, model: keras.Model):
        self._merges = Merges(model)
        self._merged = {id(merge.norm): merge for merges in self._merges.into.values() for merge in merges}
        super().__init__(model, BatchNormalization, True, self._merged)

    def freeze(self, copy: keras.Model) -> None:
        """Makes all of the copy untrainable, but batch norms that may be called in training mode all the same."""
        copy.trainable = False
        for layer, new in self._pairs.values():
            if isinstance(layer, keras.layers.BatchNormalization) and self._merges.trains(layer):
                new.trainable = layer.trainable

    def _make(self, layer: Any) -> Any:
        if id(layer) in self._merged:
            return keras.layers.Identity(name=layer.name, dtype=layer.dtype_policy.name)
        if id(layer) not in self._merges.into:
            return super()._make(layer)
        options: dict[str, Any] = {"use_bias": True, **dict.fromkeys(_WITHOUT)}
        if activation := next(filter(None, (merge.activation for merge in self._merges.into[id(layer)])), None):
            options["activation"] = function_of(activation)
        return self._remake(layer, **options)

    def _call_norm(self, fold: Fold, args: Any, kwargs: dict[str, Any]) -> Any:
        if id(fold.norm) not in self._merged:
            return super()._call_norm(fold, args, kwargs)
        arguments = inspect.signature(fold.norm.call).bind(*args, **kwargs).arguments
        y = self._copy(fold.norm)(arguments["inputs"])
        if (residual := arguments.get("residual")) is not None:
            y = self._part(fold.norm, "add")([residual, y])
            y = y if fold.norm.activation is None else self._part(fold.norm, fold.norm.activation)(y)
        return y

    def _load(self, layer: keras.Layer, copy: keras.Layer) -> list[tuple[Any, Any]]:
        if id(layer) in self._merged:
            return []
        if id(layer) not in self._merges.into:
            return super()._load(layer, copy)
        weights = merged_weights(layer, self._merges.into[id(layer)])
        copy.load_own_variables({str(place): tf.cast(each, copy.variable_dtype) for place, each in enumerate(weights)})
        named = {variable.name: variable for variable in own_variables(copy)}
        return [(each, named[each.name]) for each in own_variables(layer) if each.name in named]

    def _carry_plain(self, layer: keras.Layer, copy: keras.Layer) -> None:
        if id(layer) not in self._merged and id(layer) not in self._merges.into:  # whose attributes are others
            super()._carry_plain(layer, copy)

    def _check(self, copy: keras.Model) -> None:
        changed = [each for pair in map(self._pairs.get, (*self._merged, *self._merges.into)) for each in pair or ()]
        others = {id(variable) for layer in changed for variable in own_variables(layer)}
        wanted, got = ([v for v in each.variables if id(v) not in others] for each in (self._model, copy))
        self._check_variables(wanted, got)
        if problem := same_outputs(self._model, copy):
            self._refuse(self._model, f"{problem}. tfops.keras.convert folds nothing into weights")

    def _reports(self, layer: keras.Layer) -> Iterator[Report]:
        if not isinstance(layer, keras.layers.BatchNormalization):
            return
        if type(layer) not in CLASSES:
            merge = Merge(layer, why="its class derives from Keras'", detail=type(layer).__name__)
        else:
            hidden = Merge(layer, why="in a model or layer whose graph cannot be seen")
            merge = self._merges.of_norm.get(id(layer), hidden)
        calls = [Report(layer.name, each.kinds, each.names) for each in self._calls_of(layer)]
        report = merged(calls or [Report(layer.name)])
        into = "" if merge.layer is None else merge.layer.name
        yield report._replace(why=merge.why, detail=merge.detail, into=into)
