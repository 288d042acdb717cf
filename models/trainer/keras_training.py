"""Fit, evaluate, save, restore and report: what all Keras models here share."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import replicas
from trainer.data import UserError
from trainer.image_data import Batches
from trainer.runs import PROFILED_STEPS, WRONG_IMAGES, Run, write_classes


class Recorder(keras.callbacks.Callback):
    """Keeps the run's history: every epoch, every step's time, and batch norm's moving statistics."""

    def __init__(self, run: Run, all_steps: int):
        super().__init__()
        self._run, self._all_steps, self._step = run, all_steps, 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        # BackupAndRestore, which comes before this one, has restored the optimizer's count of steps.
        self._step = int(self.model.optimizer.iterations.numpy())
        self._run.begin(self.model._initial_epoch or 0, self._step)
        if self.params["epochs"] and self.model._initial_epoch:
            print(f"Resuming after {self.model._initial_epoch} epochs", flush=True)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch_start = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict) -> None:
        float(logs["loss"])  # waits for the device
        self._run.step_seconds.append(time.perf_counter() - self._start)
        self._step += 1
        if self._run.records_moving(self._step, self._all_steps):
            layers = [layer for layer in self.model.layers if isinstance(layer, keras.layers.BatchNormalization)]
            statistics = [(each.moving_mean.numpy(), each.moving_variance.numpy()) for each in layers]
            self._run.record_moving(self._step, {f"norm_{i}": each for i, each in enumerate(statistics, start=1)})

    def on_epoch_end(self, epoch: int, logs: dict) -> None:
        self._run.epochs.append(
            {
                "epoch": epoch + 1,
                "loss": float(logs["loss"]),
                "accuracy": float(logs["accuracy"]),
                "test_loss": float(logs["val_loss"]),
                "test_accuracy": float(logs["val_accuracy"]),
                "learning_rate": float(self.model.optimizer.learning_rate),
                "seconds": time.perf_counter() - self._epoch_start,
            }
        )
        self._run.save()


def callbacks(run: Run, options: argparse.Namespace, all_steps: int) -> list[keras.callbacks.Callback]:
    """Logs and history; the best weights."""
    chosen: list[keras.callbacks.Callback] = [Recorder(run, all_steps)]
    chosen.append(
        keras.callbacks.ModelCheckpoint(
            run.folder / "best.weights.h5",
            monitor="val_accuracy",
            mode="max",
            save_best_only=True,
            save_weights_only=True,
            initial_value_threshold=run.best,
        )
    )
    if importlib.util.find_spec("tensorboard"):
        profiled = (PROFILED_STEPS[0], PROFILED_STEPS[1] - 1) if options.profile else 0
        # Losses, accuracies and the learning rate; histograms of all weights, batch norm's statistics among them.
        chosen.append(keras.callbacks.TensorBoard(run.folder / "logs", histogram_freq=1, profile_batch=profiled))
    else:
        print("No event logs: the package tensorboard is not installed")
    return chosen


def run_model(
    build: Callable[[bool], keras.Model],
    data: Batches,
    options: argparse.Namespace,
    settings: dict[str, Any],
    strategy: tf.distribute.Strategy | None,
) -> Run:
    """Trains until `options.epochs` are done, or from where the run was interrupted until then; exports and reports.

    Args:
        build: Returns the compiled model; its argument: is batch norm synchronized?
        data: What to train and test on.
        options: The command line.
        settings: What the run's folder tells of the model.
        strategy: Of several devices, if there are.
    """
    chief = replicas.is_chief(strategy)
    # Every worker takes part in saving, but only the chief's files are read again: the others' folder is removed.
    folder = options.out if chief else options.out.with_name(f"{options.out.name}-worker-{options.index}")
    run = Run(folder, settings, options.resume and chief)
    verbose = (1 if sys.stdout.isatty() else 2) if chief else 0  # a bar with the time left, or a line an epoch

    # Fit.
    with data.names_broken_images():
        model = _fit(build, data, options, run, strategy, verbose)
    run.parameters = model.count_params()
    if not chief:
        shutil.rmtree(folder)
        return run

    # Evaluate, with the best weights, in a model of one device.
    best = run.folder / "best.weights.h5"
    final = model
    if strategy is not None:
        final = build(False)
        final.set_weights(model.get_weights())
    if best.exists():
        try:
            final.load_weights(best)
        except (OSError, ValueError, KeyError) as error:
            raise _other_model(best, error) from error
    loss, accuracy = final.evaluate(data.test, verbose=0)
    print(f"Test loss {loss:.4f}, test accuracy {accuracy:.2%}", flush=True)

    # Export and report.
    export(final, run.folder / "model", data.classes)
    wrong = list(_wrong(final, data.test))
    arrays = [np.array(each) for each in zip(*wrong, strict=True)] if wrong else [np.zeros(0)] * 3
    print(f"Report: {run.report(*arrays, data.classes, data.source)}")
    return run


def _fit(build, data, options, run, strategy, verbose) -> keras.Model:
    all_steps = options.epochs * data.steps
    checkpoints = run.folder / "checkpoints"
    if strategy is None:
        model = build(False)
        backup = keras.callbacks.BackupAndRestore(checkpoints, double_checkpoint=True, delete_checkpoint=False)
        try:
            model.fit(
                data.train,
                validation_data=data.test,
                epochs=options.epochs,
                shuffle=False,  # the dataset does it
                callbacks=[backup, *callbacks(run, options, all_steps)],
                verbose=verbose,
            )
        except (OSError, ValueError, KeyError) as error:
            if _broken_checkpoint(build, checkpoints / "latest.weights.h5"):
                raise _other_model(checkpoints / "latest.weights.h5", error) from error
            raise
    else:
        with strategy.scope():
            model = build(options.synchronized and options.norm in ("tfops", "keras"))
        chosen = callbacks(run, options, all_steps) if replicas.is_chief(strategy) else [Recorder(run, all_steps)]
        replicas.fit(strategy, model, data, options, checkpoints, chosen, verbose)
    return model


def _broken_checkpoint(build: Callable[[bool], keras.Model], path: Path) -> bool:
    """Is it the checkpoint, and not the training, that failed?"""
    if not path.exists():
        return False
    model = build(False)
    model.optimizer.build(model.trainable_variables)
    try:
        model.load_weights(path)
    except (OSError, ValueError, KeyError):
        return True
    return False


def _other_model(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(f"{path}: not a checkpoint of this model, or a damaged one: {reason}")


def export(model: keras.Model, folder: Path, classes: list[str]) -> None:
    """Writes the SavedModel: images in, probabilities out."""
    shutil.rmtree(folder, ignore_errors=True)
    inputs = keras.Input(model.input_shape[1:])
    probabilities = keras.layers.Softmax(dtype="float32")(model(inputs))
    keras.Model(inputs, probabilities).export(folder, verbose=False)
    write_classes(folder, classes)


def _wrong(model: keras.Model, batches: Iterable):
    shown = 0
    for images, labels in batches:
        probabilities = tf.nn.softmax(model.predict_on_batch(images)).numpy()
        for index in np.flatnonzero(probabilities.argmax(-1) != labels.numpy()):
            yield images[index].numpy(), int(labels[index]), probabilities[index]
            shown += 1
            if shown == WRONG_IMAGES:
                return
