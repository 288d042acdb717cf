"""The session of the graph style: initialize or restore, train, print, test, save, for any network.

A `Network` is what the session needs of a graph. The graph itself runs nothing; a session runs parts of it, with
values fed in for placeholders, and returns what it is asked to fetch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from trainer.data import UserError
from trainer.image_data import Batches
from trainer.options import session_config
from trainer.runs import PROFILED_STEPS, WRONG_IMAGES, Run, write_classes

v1 = tf.compat.v1


@dataclasses.dataclass(frozen=True)
class Network:
    """A graph, and the names for what a session feeds and fetches.

    Attributes:
        graph: All of it.
        images, labels, training, dropout: Placeholders.
        logits, probabilities: float32 `[batch, classes]`.
        loss, correct, learning_rate: Scalars: mean loss, how many are right, and the rate at this step.
        train: The training op; its value is how many steps there have been with this one.
        initialize: The op that gives all variables their first values.
        step, epoch: Variables: training steps and epochs so far.
        next_epoch: The op that counts the epoch.
        summaries: Events of a step, serialized.
        saver, best_saver: Write and read checkpoints.
        moving: Batch norm's layer -> (moving mean, moving variance).
        dropout_rate: What to feed in training.
    """

    graph: tf.Graph
    images: tf.Tensor
    labels: tf.Tensor
    training: tf.Tensor
    dropout: tf.Tensor
    logits: tf.Tensor
    probabilities: tf.Tensor
    loss: tf.Tensor
    correct: tf.Tensor
    learning_rate: tf.Tensor
    train: tf.Tensor
    initialize: tf.Operation
    step: tf.Variable
    epoch: tf.Variable
    next_epoch: tf.Tensor
    summaries: tf.Tensor
    saver: v1.train.Saver
    best_saver: v1.train.Saver
    moving: dict[str, tuple[tf.Tensor, tf.Tensor]]
    dropout_rate: float

    @property
    def parameters(self) -> int:
        """Weights, biases, and batch norm's four vectors, as Keras counts them."""
        with self.graph.as_default():
            kept = [*v1.trainable_variables(), *(each for pair in self.moving.values() for each in pair)]
        return sum(int(np.prod(variable.shape)) for variable in kept)


def complete(
    *,
    images: tf.Tensor,
    labels: tf.Tensor,
    training: tf.Tensor,
    dropout: tf.Tensor,
    logits: tf.Tensor,
    probabilities: tf.Tensor,
    schedule: Callable[[tf.Variable], tf.Tensor],
    make_optimizer: Callable[[tf.Tensor], v1.train.Optimizer],
    device: str | None,
    precision: str,
    dropout_rate: float,
    weight_decay: float = 0.0,
) -> Network:
    """Adds to the default graph all that follows a model: loss, optimizer, training op, initialization, logs, savers.

    Args:
        images, labels, training, dropout, logits, probabilities, dropout_rate: See `Network`.
        schedule: The learning rate, from the number of steps.
        make_optimizer: The optimizer, from the learning rate.
        device: Of loss and optimization; None: TensorFlow's choice.
        precision: With "mixed_float16" the loss is scaled.
        weight_decay: Of the kernels; the optimizer sees it, and the log does not.
    """
    with tf.device(device):
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), name="loss")
        right = tf.equal(tf.argmax(logits, -1, output_type=tf.int32), labels)
        correct = tf.reduce_sum(tf.cast(right, tf.int32), name="correct")
        decayed = loss
        if weight_decay:
            kernels = [each for each in v1.trainable_variables() if each.op.name.endswith("/kernel")]
            decayed = loss + weight_decay * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])

        step = v1.train.get_or_create_global_step()
        rate = schedule(step)
        optimizer = make_optimizer(rate)
        if precision == "mixed_float16":
            # Gradients below 6e-8 would be 0 in float16: the loss is scaled up, and the gradients down again.
            scale = v1.mixed_precision.DynamicLossScale()
            optimizer = v1.mixed_precision.MixedPrecisionLossScaleOptimizer(optimizer, scale)
        # The training op updates the variables, and batch norm's moving averages with them.
        updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        with tf.control_dependencies([optimizer.minimize(decayed, global_step=step), *updates]):
            train = tf.identity(step.read_value(), name="train")

    epoch = v1.get_variable("epoch", [], tf.int64, initializer=tf.zeros_initializer(), trainable=False)
    next_epoch = v1.assign_add(epoch, 1)
    initialize = v1.global_variables_initializer()

    v1.summary.scalar("log/loss", loss)
    v1.summary.scalar("log/accuracy", tf.cast(correct, tf.float32) / tf.cast(tf.size(labels), tf.float32))
    v1.summary.scalar("log/learning_rate", rate)
    summarize_norms()
    return Network(
        graph=v1.get_default_graph(),
        images=images,
        labels=labels,
        training=training,
        dropout=dropout,
        logits=logits,
        probabilities=probabilities,
        loss=loss,
        correct=correct,
        learning_rate=rate,
        train=train,
        initialize=initialize,
        step=step,
        epoch=epoch,
        next_epoch=next_epoch,
        summaries=v1.summary.merge_all(),
        saver=v1.train.Saver(max_to_keep=2),
        best_saver=v1.train.Saver(max_to_keep=1),
        moving=moving_statistics(),
        dropout_rate=dropout_rate,
    )


def moving_statistics() -> dict[str, tuple[tf.Variable, tf.Variable]]:
    """Batch norm's moving mean and variance in the default graph, by layer."""
    found: dict[str, dict] = {}
    for variable in v1.global_variables():
        layer, _, name = variable.op.name.rpartition("/")
        if name in ("moving_mean", "moving_variance"):
            found.setdefault(layer, {})[name] = variable
    return {layer: (pair["moving_mean"], pair["moving_variance"]) for layer, pair in found.items()}


def summarize_norms() -> None:
    """Adds histograms of batch norm's variables to the default graph's summaries."""
    for layer, moving in moving_statistics().items():
        own = [each for each in v1.trainable_variables() if each.op.name in (f"{layer}/gamma", f"{layer}/beta")]
        for variable in (*own, *moving):
            v1.summary.histogram(f"log/{variable.op.name}", variable)


def restore(session: v1.Session, saver: v1.train.Saver, path: str) -> None:
    """Raises UserError, naming the checkpoint, if it is another model's or damaged."""
    try:
        shapes = tf.train.load_checkpoint(path).get_variable_to_shape_map()
        with session.graph.as_default():
            for variable in v1.global_variables():  # the saver itself would take a variable of any shape
                found, wanted = shapes.get(variable.op.name), variable.shape.as_list()
                if found != wanted:
                    raise ValueError(f"{variable.op.name} has shape {found} in it, not {wanted}")
            saver.restore(session, path)
    except (tf.errors.OpError, ValueError) as error:
        reason = str(getattr(error, "message", error)).splitlines()[0]
        raise UserError(f"{path}: not a checkpoint of this model, or a damaged one: {reason}") from error


def evaluate(session: v1.Session, network: Network, batches: Iterable) -> tuple[float, float]:
    """Mean loss and accuracy, a batch at a time, so that memory does not depend on how many images there are."""
    loss, correct, count = 0.0, 0, 0
    for images, labels in batches:
        feed = {network.images: images, network.labels: labels}
        batch_loss, batch_correct = session.run([network.loss, network.correct], feed)
        loss, correct, count = loss + batch_loss * len(labels), correct + int(batch_correct), count + len(labels)
    return loss / count, correct / count


def train(network: Network, data: Batches, options: argparse.Namespace, run: Run) -> None:
    """Runs the session: until `options.epochs` are done, or from where the run was interrupted until then."""
    checkpoints, best = run.folder / "checkpoints", run.folder / "best"
    with network.graph.as_default():
        logs = v1.summary.FileWriter(str(run.folder / "logs"), network.graph)
    profiler = Profiler(run.folder / "logs", options.profile)
    all_steps = options.epochs * data.steps

    # closing() and not the session's own `with`, which would make its graph the default one: tf.data would become part
    # of it, where it is to run eagerly and hand out arrays.
    config = session_config(options)
    with data.names_broken_images(), contextlib.closing(v1.Session(graph=network.graph, config=config)) as session:
        # Initialize, or restore.
        session.run(network.initialize)
        latest = tf.train.latest_checkpoint(str(checkpoints)) if options.resume else None
        if latest:
            restore(session, network.saver, latest)
        first_epoch, step = session.run([network.epoch, network.step])
        run.begin(first_epoch, step)
        if options.resume:
            print(f"Resuming after {first_epoch} epochs" if latest else "No checkpoint yet: starting")

        for epoch in range(first_epoch, options.epochs):
            # Train. The placeholder `training` has batch norm use the batch's statistics, and the training op moves the
            # moving ones towards them.
            start = time.perf_counter()
            print(f"Epoch {epoch + 1}/{options.epochs}", flush=True)
            sums = np.zeros(3)  # of loss, of right answers, of images
            progress = keras.utils.Progbar(
                data.steps, verbose=1 if sys.stdout.isatty() else 2, stateful_metrics=["loss", "accuracy"]
            )
            for batch, (images, labels) in enumerate(data.train.as_numpy_iterator()):
                profiler.before(step)
                began = time.perf_counter()
                feed = {
                    network.images: images,
                    network.labels: labels,
                    network.training: True,
                    network.dropout: network.dropout_rate,
                }
                records = run.records_moving(step + 1, all_steps)
                fetches = [network.train, network.learning_rate, network.loss, network.correct]
                step, rate, loss, correct, *events = session.run(fetches + [network.summaries] * records, feed)
                run.step_seconds.append(time.perf_counter() - began)
                # Print.
                sums += [loss * len(labels), correct, len(labels)]
                progress.update(batch + 1, [("loss", sums[0] / sums[2]), ("accuracy", sums[1] / sums[2])])
                if records:
                    run.record_moving(int(step), session.run(network.moving))
                    logs.add_summary(*events, step)

            # Test.
            test_loss, test_accuracy = evaluate(session, network, data.test.as_numpy_iterator())
            improved = test_accuracy > run.best
            run.epochs.append(
                {
                    "epoch": epoch + 1,
                    "loss": sums[0] / sums[2],
                    "accuracy": sums[1] / sums[2],
                    "test_loss": float(test_loss),
                    "test_accuracy": float(test_accuracy),
                    "learning_rate": float(rate),
                    "seconds": time.perf_counter() - start,
                }
            )
            run.print_epoch()
            tests = v1.Summary()
            tests.value.add(tag="log/test_loss", simple_value=test_loss)
            tests.value.add(tag="log/test_accuracy", simple_value=test_accuracy)
            logs.add_summary(tests, step)
            logs.flush()

            # Save.
            run.save()
            session.run(network.next_epoch)
            with network.graph.as_default():
                if improved:
                    network.best_saver.save(session, str(best / "model"))
                network.saver.save(session, str(checkpoints / "model"), global_step=epoch + 1)

        # Restore the best, export it, and report.
        latest_best = tf.train.latest_checkpoint(str(best))
        if latest_best:
            restore(session, network.best_saver, latest_best)
        export(session, network, run.folder / "model", data.classes)
        wrong = list(_wrong(session, network, data.test.as_numpy_iterator()))
        arrays = [np.array(each) for each in zip(*wrong, strict=True)] if wrong else [np.zeros(0)] * 3
        print(f"Report: {run.report(*arrays, data.classes, data.source)}")
    profiler.stop()
    logs.close()


def export(session: v1.Session, network: Network, folder: Path, classes: list[str]) -> None:
    """Writes the SavedModel: images in, probabilities out."""
    shutil.rmtree(folder, ignore_errors=True)
    with network.graph.as_default():
        v1.saved_model.simple_save(
            session, str(folder), {"images": network.images}, {"probabilities": network.probabilities}
        )
    write_classes(folder, classes)


def _wrong(session: v1.Session, network: Network, batches: Iterable):
    shown = 0
    for images, labels in batches:
        probabilities = session.run(network.probabilities, {network.images: images})
        for index in np.flatnonzero(probabilities.argmax(-1) != labels):
            yield images[index], labels[index], probabilities[index]
            shown += 1
            if shown == WRONG_IMAGES:
                return


class Profiler:
    """TensorFlow's profiler on a few steps; TensorBoard's profile plugin shows what it wrote."""

    def __init__(self, logs: Path, wanted: bool):
        self._logs, self._wanted, self._running = str(logs), wanted, False

    def before(self, step: int) -> None:
        """Call it before every step, with how many there have been."""
        if self._wanted and step == PROFILED_STEPS[0]:
            tf.profiler.experimental.start(self._logs)
            self._running = True
        elif step == PROFILED_STEPS[1]:
            self.stop()

    def stop(self) -> None:
        if self._running:
            tf.profiler.experimental.stop()
            self._running = False
