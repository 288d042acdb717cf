"""AlexNet's parameters, data and command line, for both ways of writing it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from trainer.data import UserError
from trainer.image_data import Batches, image_batches
from trainer.options import (
    add_device_arguments,
    add_run_arguments,
    add_training_arguments,
    check_devices,
    count,
    positive,
)

MIN_IMAGE_SIZE = 67  # the last pooling still has its 3 x 3 pixels
DENSE = (4096, 4096)  # and one more, of as many units as there are classes
DROPOUT = 0.5
WEIGHT_DECAY = 5e-4


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One of the paper's convolutional layers; `normalized` and `pooled` (3 x 3, every 2) are what follows it."""

    filters: int
    kernel: int
    strides: int = 1
    padding: str = "same"
    groups: int = 1
    normalized: bool = False
    pooled: bool = False


CONVOLUTIONS = (
    Convolution(96, 11, strides=4, padding="valid", normalized=True, pooled=True),
    Convolution(256, 5, groups=2, normalized=True, pooled=True),
    Convolution(384, 3),
    Convolution(384, 3, groups=2),
    Convolution(256, 3, groups=2, pooled=True),
)


def scaled(units: int, width: float, groups: int = 2) -> int:
    """`units` times `width`, an even number: the next layer may divide it in two groups."""
    return max(2, groups, 2 * round(units * width / 2))


def boundaries(steps: int) -> list[int]:
    """The steps at which the learning rate is divided by 10."""
    return [int(0.6 * steps), int(0.85 * steps)]


def read_data(options: argparse.Namespace) -> Batches:
    """The images. Sets `options.classes`, if it was not given, and `options.settings`, which tell of the model."""
    data = image_batches(
        options.data,
        options.image_size,
        options.batch_size,
        options.seed,
        options.limit,
        options.resize,
        options.classes,
    )
    options.classes = options.classes or len(data.classes)
    if options.classes < len(data.classes):
        raise UserError(f"--classes must be at least {len(data.classes)}, as {data.source} has, not {options.classes}")
    names = ("norm", "precision", "image_size", "classes", "width")
    options.settings = {name.replace("_", " "): getattr(options, name) for name in names}
    return data


def parse(argv: Sequence[str] | None, style: str) -> argparse.Namespace:
    """The command line; ends the program with status 2 if it is wrong."""
    parser = argparse.ArgumentParser(description=f"Trains AlexNet, in the {style} style.")
    parser.add_argument(
        "--data",
        metavar="digits|cifar10|synthetic|PATH",
        default="digits",
        help="MNIST's digits, enlarged (default); CIFAR-10; noise, to measure throughput; or a folder with a folder of "
        "images for each class; or mnist.npz",
    )
    parser.add_argument("--resize", action="store_true", help="take a folder's images even if their sizes differ")
    parser.add_argument("--image-size", type=count, default=227, help="height and width (default: 227)")
    parser.add_argument("--classes", type=count, help="outputs (default: as the data have; synthetic: 1000)")
    parser.add_argument("--width", type=positive, default=1.0, help="of every layer, as a part of it (default: 1)")
    add_training_arguments(parser, epochs=3, batch_size=128, rate=0.01)
    add_run_arguments(parser, f"runs/alexnet_{style}")
    add_device_arguments(parser, style)
    options = parser.parse_args(argv)
    if options.image_size < MIN_IMAGE_SIZE:
        parser.error(f"argument --image-size: must be at least {MIN_IMAGE_SIZE}, not {options.image_size}")
    check_devices(parser, options)
    return options
