"""What is on an image? `python models/train.py predict runs/mnist_keras/model digit.png`, or a folder of images.

Reads the SavedModel that any of the models here wrote, whichever way it was written in.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

import tfops  # noqa: F401  (registers the ops that the model holds)
from trainer.data import DataError, UserError
from trainer.image_data import SUFFIXES
from trainer.options import count, run_main


class Classifier:
    """A SavedModel from images `[batch, height, width, channels]`, 0 to 1, to probabilities `[batch, classes]`.

    Attributes:
        shape: Of an image: (height, width, channels).
        classes: Names of the classes.
    """

    def __init__(self, folder: Path):
        """Raises UserError, naming the folder, if it is no such model."""
        try:
            self._model = tf.saved_model.load(str(folder))  # owns the variables
            self._run = self._model.signatures["serving_default"]
            ((self._input, spec),) = self._run.structured_input_signature[1].items()
            ((self._output, result),) = self._run.structured_outputs.items()
            self.shape = tuple(spec.shape[1:])
            self.classes = json.loads((folder / "classes.json").read_text())
            if len(self.shape) != 3 or None in self.shape or result.shape[-1] < len(self.classes):
                raise ValueError(f"from {spec.shape} to {result.shape}")
        except (OSError, tf.errors.OpError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{folder}: not a model that these programs exported: {reason}") from error
        self.classes += [str(i) for i in range(len(self.classes), result.shape[-1])]

    def read(self, path: Path) -> np.ndarray:
        """The image, `[height, width, channels]`. Raises DataError, naming the file, if it is none."""
        height, width, channels = self.shape
        try:
            with Image.open(path) as image:
                image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for broken PNGs
            raise DataError(f"{path}: not a readable image: {error}".replace("\n", " ")) from error
        pixels = keras.utils.img_to_array(image) / 255
        if channels == 1 and np.median(np.concatenate([pixels[[0, -1]].ravel(), pixels[:, [0, -1]].ravel()])) > 0.5:
            pixels = 1 - pixels  # MNIST's digits are light on dark; paper is not
        return pixels

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 `[batch, height, width, channels]` to `[batch, classes]`."""
        return self._run(**{self._input: tf.constant(images, tf.float32)})[self._output].numpy()


def image_files(path: Path) -> list[Path]:
    """The path itself, or the images in a folder and below. Raises DataError if there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{path}: no images in it ({', '.join(SUFFIXES)})")
    return files


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prints the most likely classes of images, with probabilities.")
    parser.add_argument("model", type=Path, help="a SavedModel: the folder model/ of a run")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=count, default=3, help="classes an image (default: 3)")
    parser.add_argument("--batch-size", type=count, default=64, help="images at a time (default: 64)")
    return parser.parse_args(argv)


def predict(options: argparse.Namespace) -> None:
    """Prints a line an image: its path, then classes and probabilities, the likeliest first."""
    files = [file for path in options.images for file in image_files(path)]
    classifier = Classifier(options.model)
    for start in range(0, len(files), options.batch_size):
        batch = files[start : start + options.batch_size]
        for path, probabilities in zip(batch, classifier(np.stack([*map(classifier.read, batch)])), strict=True):
            best = probabilities.argsort()[::-1][: options.top]
            print(f"{path}  " + "  ".join(f"{classifier.classes[i]} {probabilities[i]:.1%}" for i in best))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_main(parse_arguments, lambda options: None, predict, argv)


if __name__ == "__main__":
    sys.exit(main())
