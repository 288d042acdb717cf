"""Training on several devices in step: each has all weights and computes gradients on its share of every batch.

Devices of one machine: `--devices`, `tf.distribute.MirroredStrategy`. Several machines or processes: `--workers` and
`--index`, or TF_CONFIG, `tf.distribute.MultiWorkerMirroredStrategy`. Both take the loop below and not Keras' `fit`,
which weights the last batch's smaller shares as if they were full (and with several workers fails, in Keras 3.15).

Bytes a step on the wire, for n devices that reduce along a ring: each sends and receives 2 (n - 1) / n of what is
reduced: all gradients, 4 bytes a parameter; 12 bytes of loss, right answers and count; and for synchronized batch norm,
a phase each in the forward and the backward pass, two or three floats a channel. models/README.md has the numbers.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import keras
import tensorflow as tf

from trainer.data import UserError
from trainer.image_data import Batches
from trainer.options import configure_workers


class WorkerLost(UserError):
    """Another worker does not answer."""

    status = 3


def make_strategy(options: argparse.Namespace) -> tf.distribute.Strategy | None:
    """The strategy that the command line and TF_CONFIG ask for; None for one device."""
    configure_workers(options)
    if "TF_CONFIG" in os.environ:
        try:
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
            options.index = int(resolver.task_id or 0)
            communication = tf.distribute.experimental.CommunicationOptions(timeout_seconds=options.timeout)
            return tf.distribute.MultiWorkerMirroredStrategy(resolver, communication)
        except tf.errors.OpError as error:
            raise WorkerLost(f"the other workers did not appear: {error.message.splitlines()[0]}") from error
        except ValueError as error:
            raise UserError(f"TF_CONFIG: {error}") from error
    if options.devices:
        return tf.distribute.MirroredStrategy(options.devices)
    return None


def is_chief(strategy: tf.distribute.Strategy | None) -> bool:
    """Does this process print, log and export?"""
    resolver = strategy and strategy.cluster_resolver
    return not resolver or not resolver.task_id


class Steps:
    """One training step and one test step of a compiled classifier, on all replicas at once.

    Both return float32 `[3]`: the sum of losses, how many are right, and how many there are, over all replicas.
    """

    def __init__(self, strategy: tf.distribute.Strategy, model: keras.Model):
        self._strategy, self._model = strategy, model
        self._loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")

    def _totals(self, images: tf.Tensor, labels: tf.Tensor, training: bool) -> tuple[tf.Tensor, tf.Tensor]:
        """This replica's sum of losses, and the three sums over all."""
        logits = self._model(images, training=training)
        counts = tf.cast(labels >= 0, tf.float32)
        loss = tf.reduce_sum(counts * self._loss(tf.maximum(labels, 0), logits))
        right = tf.reduce_sum(tf.cast(tf.argmax(logits, -1, output_type=tf.int32) == labels, tf.float32))
        local = tf.stack([tf.stop_gradient(loss), right, tf.reduce_sum(counts)])
        return loss, tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, local)

    def _train(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        model = self._model
        with tf.GradientTape() as tape:
            loss, totals = self._totals(images, labels, training=True)
            # Shares may be unequal, or empty: the mean is over the images, not over the replicas. The optimizer sums
            # the gradients over the replicas.
            loss /= tf.maximum(totals[2], 1.0)
            loss += sum(model.losses) / self._strategy.num_replicas_in_sync  # weight decay
            loss = model.optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)
        return totals

    def _test(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        # The last batch may leave some replicas without an image: see `_full_batches`. Here one more does no harm.
        images, labels = tf.pad(images, [[0, 1], [0, 0], [0, 0], [0, 0]]), tf.pad(labels, [[0, 1]], constant_values=-1)
        return self._totals(images, labels, training=False)[1]

    @tf.function(reduce_retracing=True)
    def train(self, batch: tuple) -> tf.Tensor:
        return self._strategy.experimental_local_results(self._strategy.run(self._train, args=batch))[0]

    @tf.function(reduce_retracing=True)
    def test(self, batch: tuple) -> tf.Tensor:
        return self._strategy.experimental_local_results(self._strategy.run(self._test, args=batch))[0]


def fit(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    data: Batches,
    options: argparse.Namespace,
    checkpoints: Path,
    callbacks: list[keras.callbacks.Callback],
    verbose: int,
) -> None:
    """`model.fit` with validation, on all replicas; goes on from the last checkpoint if `options.resume`.

    Every worker has to take part in saving, each in a folder `checkpoints` of its own; all restore from the chief's, in
    `options.out`, which they have to share.

    Raises:
        WorkerLost: Another worker died or did not answer within `options.timeout` seconds.
        UserError: The checkpoint is another model's, or the workers have different ones.
    """
    try:
        _fit(strategy, model, data, options, checkpoints, callbacks, verbose)
    except (
        tf.errors.UnavailableError,
        tf.errors.DeadlineExceededError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
    ) as error:
        if strategy.cluster_resolver is None:
            raise
        raise WorkerLost(
            f"worker {options.index}: another worker died or does not answer ({type(error).__name__}); "
            "start all of them again with --resume"
        ) from error


def _fit(strategy, model, data, options, checkpoints, callbacks, verbose) -> None:
    steps = Steps(strategy, model)
    with strategy.scope():
        epoch_variable = tf.Variable(0, trainable=False, dtype=tf.int64, name="epoch")
        model.optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer, epoch=epoch_variable)
    manager = tf.train.CheckpointManager(checkpoint, str(checkpoints), max_to_keep=2)
    latest = tf.train.latest_checkpoint(str(options.out / "checkpoints")) if options.resume else None
    if latest:
        try:
            checkpoint.restore(latest).assert_existing_objects_matched()
        except (tf.errors.OpError, ValueError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{latest}: not a checkpoint of this model, or a damaged one: {reason}") from error
    first_epoch = int(epoch_variable.numpy())
    model._initial_epoch = first_epoch  # where Keras' own callback puts it
    _check_agreement(strategy, first_epoch)

    batches, count = _full_batches(strategy, data, options)
    train = strategy.experimental_distribute_dataset(_by_data(batches))
    test = strategy.experimental_distribute_dataset(_by_data(data.test))
    calls = keras.callbacks.CallbackList(
        callbacks, add_history=True, add_progbar=verbose != 0, verbose=verbose, epochs=options.epochs,
        steps=count, model=model,
    )  # fmt: skip
    calls.on_train_begin()
    logs: dict[str, float] = {}
    for epoch in range(first_epoch, options.epochs):
        calls.on_epoch_begin(epoch)
        sums = tf.zeros(3)
        for index, batch in enumerate(train):
            calls.on_train_batch_begin(index)
            sums += steps.train(batch)
            loss, right, count = sums.numpy()
            logs = {"loss": loss / count, "accuracy": right / count}
            calls.on_train_batch_end(index, logs)
        loss, right, count = sum((steps.test(batch) for batch in test), tf.zeros(3)).numpy()
        logs |= {"val_loss": loss / count, "val_accuracy": right / count}
        epoch_variable.assign(epoch + 1)
        manager.save(checkpoint_number=epoch + 1)
        calls.on_epoch_end(epoch, logs)
    calls.on_train_end(logs)


def _full_batches(
    strategy: tf.distribute.Strategy, data: Batches, options: argparse.Namespace
) -> tuple[tf.data.Dataset, int]:
    """The training batches without an epoch's last one if that is smaller, and how many they are.

    TensorFlow would give the first replicas all of it and the others nothing. tfops' batch norm is right then, but
    oneDNN's convolution, in TensorFlow 2.21 on a CPU, gives an empty batch the shape of its input. As every epoch has
    another order, no image is left out for good.
    """
    replicas, full = strategy.num_replicas_in_sync, data.train_size // options.batch_size
    if options.batch_size < replicas or not full:
        raise UserError(
            f"--batch-size must be from {replicas} (one image for each device) to {data.train_size} (all there are), "
            f"not {options.batch_size}"
        )
    return data.train.take(full), full


def _by_data(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Each worker reads all images and takes its share of every batch: the files need not be divisible."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.with_options(options)


def _check_agreement(strategy: tf.distribute.Strategy, epoch: int) -> None:
    """Workers without a shared file system may find different checkpoints: one line is better than wrong gradients."""

    def sums() -> tf.Tensor:
        here = tf.constant([float(epoch), float(epoch) ** 2])
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here)

    of_all = tf.function(lambda: strategy.experimental_local_results(strategy.run(sums))[0])
    total, squares = of_all().numpy()
    if total**2 != strategy.num_replicas_in_sync * squares:
        raise UserError(
            f"the workers found checkpoints of different epochs (here: {epoch}); they need a shared folder for --out"
        )
