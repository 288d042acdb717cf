"""A run's folder: its history, what it has learned, and at the end pictures and a report that links them.

history.json       what was measured, epoch by epoch
checkpoints/       the last states, to go on from with --resume
best...            the weights that did best on the test images
model/             the trained model as a SavedModel, with the names of its classes: trainer.predict reads it
logs/              events for TensorBoard: `tensorboard --logdir FOLDER/logs`
report.md, *.png   learning curves; test images it got wrong; batch norm's moving statistics
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer.data import UserError

WARM_UP = 10  # steps that are not timed: they trace and allocate
PROFILED_STEPS = (10, 15)
MOVING_RECORDS = 200  # a run
MOVING_CHANNELS = 8  # of each layer
WRONG_IMAGES = 40
FOLDERS = ("checkpoints", "best", "model", "logs")


class Run:
    """The folder of one training run, and its history.

    Attributes:
        folder: Its path.
        settings: How the model was built and trained, for the report; a run can only go on with the same model.
        epochs: One dict an epoch: epoch, loss, accuracy, test_loss, test_accuracy, learning_rate, seconds.
        moving: One dict a record: step, and by layer mean and variance, each `[channels]`.
        step_seconds: Of every step since the program began.
        parameters: How many the model has.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool):
        """Opens a run to go on with, or makes a new one in the place of an old one.

        Raises:
            UserError: The folder has something else in it, or cannot be written; or it is another model's.
        """
        self.folder = folder
        self.settings = settings
        self.epochs: list[dict] = []
        self.moving: list[dict] = []
        self.step_seconds: list[float] = []
        self.parameters = 0
        history = folder / "history.json"
        try:
            if resume and history.exists():
                self._read(history)
                return
            if folder.exists() and any(folder.iterdir()) and not history.exists():
                raise UserError(f"{folder}: not empty, and no run of these models; name another folder with --out")
            for name in FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "best.weights.h5").unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            self.save()
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror or error}") from error

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            settings, self.epochs, self.moving = content["settings"], content["epochs"], content["moving"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a run's history: {error}") from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise UserError(
                    f"{self.folder}: a run of another model: its {name} is {settings.get(name)!r}, not {value!r}"
                )

    def save(self) -> None:
        """Writes the history, all or nothing."""
        path = self.folder / "history.json"
        content = {"settings": self.settings, "epochs": self.epochs, "moving": self.moving}
        path.with_suffix(".new").write_text(json.dumps(content))
        os.replace(path.with_suffix(".new"), path)

    def begin(self, epoch: int, step: int) -> None:
        """Forgets what came after the checkpoint that training goes on from."""
        self.epochs = [each for each in self.epochs if each["epoch"] <= epoch]
        self.moving = [record for record in self.moving if record["step"] <= step]

    def records_moving(self, step: int, all_steps: int) -> bool:
        """Is this a step after which batch norm's moving statistics are recorded?"""
        return bool(step % max(1, all_steps // MOVING_RECORDS) == 0)  # step may be NumPy's

    def record_moving(self, step: int, statistics: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Records layer -> (moving mean, moving variance), of the first channels."""
        layers = {
            name: {"mean": mean[:MOVING_CHANNELS].tolist(), "variance": variance[:MOVING_CHANNELS].tolist()}
            for name, (mean, variance) in statistics.items()
        }
        if layers:
            self.moving.append({"step": step, **layers})

    @property
    def best(self) -> float:
        """The best test accuracy so far; -1 before the first epoch."""
        return max((epoch["test_accuracy"] for epoch in self.epochs), default=-1.0)

    @property
    def ms_per_step(self) -> float:
        """The median of the steps after the warm-up, or of all if there are no more; NaN if there were none."""
        seconds = self.step_seconds[WARM_UP:] or self.step_seconds
        return 1e3 * float(np.median(seconds)) if seconds else float("nan")

    def print_epoch(self) -> None:
        epoch = self.epochs[-1]
        print(
            f"Epoch {epoch['epoch']}: loss {epoch['loss']:.4f}, accuracy {epoch['accuracy']:.2%}, "
            f"test loss {epoch['test_loss']:.4f}, test accuracy {epoch['test_accuracy']:.2%}",
            flush=True,
        )

    # Pictures. --------------------------------------------------------------------------------------------------------

    def report(
        self, images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, classes: list[str], source: str
    ) -> Path:
        """Draws all pictures and writes the report.

        Args:
            images: Of the test: float32 `[n, height, width, channels]`, 0 to 1, those that the model got wrong.
            labels: What they are: `[n]`.
            probabilities: What the model said: `[n, classes]`.
            classes: Their names.
            source: Where the data are from.

        Returns:
            The report's path.
        """
        pictures = {
            "Learning curves": ("curves.png", self._draw_curves()),
            "Test images that it got wrong, with what it said": (
                "wrong.png",
                _draw_wrong(images, labels, probabilities, classes),
            ),
            "Batch norm's moving mean and variance": ("moving.png", self._draw_moving()),
        }
        lines = [f"# {self.settings['model']}, {self.settings['style']} style", "", f"Data: {source}", ""]
        if self.epochs:
            last = self.epochs[-1]
            lines += [
                f"Test accuracy after {last['epoch']} epochs: {last['test_accuracy']:.2%}; the best: {self.best:.2%}.",
                f"A step took {self.ms_per_step:.1f} ms (median)." if self.step_seconds else "",
                "",
            ]
        lines += ["| setting | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.settings.items()), ""]
        lines += ["| epoch | loss | accuracy | test loss | test accuracy | seconds |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {e['epoch']} | {e['loss']:.4f} | {e['accuracy']:.2%} | {e['test_loss']:.4f} | "
            f"{e['test_accuracy']:.2%} | {e['seconds']:.1f} |"
            for e in self.epochs
        ]
        for title, (name, figure) in pictures.items():
            if figure is None:
                (self.folder / name).unlink(missing_ok=True)
                continue
            figure.savefig(self.folder / name, dpi=80)
            lines += ["", f"## {title}", "", f"![{title}]({name})"]
        path = self.folder / "report.md"
        path.write_text("\n".join(lines) + "\n")
        return path

    def _draw_curves(self) -> Figure | None:
        if not self.epochs:
            return None
        figure = Figure((8, 3.2), layout="constrained")
        epochs = [epoch["epoch"] for epoch in self.epochs]
        for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for key, label in ((name, "training"), (f"test_{name}", "test")):
                axes.plot(epochs, [epoch[key] for epoch in self.epochs], marker="o", label=label)
            axes.set(xlabel="epoch", title=name)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend()
        return figure

    def _draw_moving(self) -> Figure | None:
        if not self.moving:
            return None
        layers = [name for name in self.moving[0] if name != "step"]
        steps = [record["step"] for record in self.moving]
        figure = Figure((8, 2.2 * len(layers)), layout="constrained")
        for row, name in zip(figure.subplots(len(layers), 2, squeeze=False), layers, strict=True):
            for axes, statistic in zip(row, ("mean", "variance"), strict=True):
                axes.plot(steps, [record[name][statistic] for record in self.moving], linewidth=0.8)
                axes.set_title(f"{name}: moving {statistic}, {MOVING_CHANNELS} channels", fontsize="small")
                axes.tick_params(labelsize="small")
                axes.grid(alpha=0.3)
        for axes in figure.axes[-2:]:
            axes.set_xlabel("step")
        return figure


def _draw_wrong(images, labels, probabilities, classes) -> Figure | None:
    shown = min(len(images), WRONG_IMAGES)
    if not shown:
        return None
    columns = min(shown, 10)
    rows = -(-shown // columns)
    figure = Figure((columns, 1.35 * rows + 0.2), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each in axes:
        each.axis("off")
    for each, image, label, said in zip(axes, images, labels, probabilities, strict=False):
        each.imshow(np.clip(image, 0, 1).squeeze(), cmap="gray_r", vmin=0, vmax=1)
        guess = int(said.argmax())
        each.set_title(f"{classes[guess]}? {classes[int(label)]}\n{said[guess]:.0%}", fontsize=7)
    return figure


def write_classes(model: Path, classes: Iterable[str]) -> None:
    """The names of the classes, beside a SavedModel."""
    (model / "classes.json").write_text(json.dumps(list(classes)))
