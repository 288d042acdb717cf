"""What the networks train on, as batches: digits, CIFAR-10, a folder of class folders of images, or random numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from trainer.data import DOWNLOAD_TIMEOUT, DataError, load_mnist

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")  # those of keras.utils.image_dataset_from_directory
TEST_FRACTION = 0.2  # of a folder's images
SYNTHETIC_STEPS = 20  # an epoch
CACHED_BYTES = 2**30  # images are kept decoded and scaled if they take no more than this


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of images and labels.

    Attributes:
        train, test: Datasets of float32 `[batch, height, width, channels]`, 0 to 1, and int32 `[batch]`. Every pass
            over `train` has another order; that of `test` is fixed.
        train_size, test_size: Images.
        classes: Names of the classes.
        source: Where the images are from, in words.
        files: The images' files, if there are any.
    """

    train: tf.data.Dataset
    test: tf.data.Dataset
    train_size: int
    test_size: int
    classes: list[str]
    source: str
    files: list[Path] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return int(self.train.cardinality())

    def describe(self) -> str:
        return f"Data: {self.source}\n{self.train_size:,} images to train on, {self.test_size:,} to test on"

    @contextlib.contextmanager
    def names_broken_images(self) -> Iterator[None]:
        """TensorFlow does not say which image it could not decode: looks for it, and raises a DataError."""
        try:
            yield
        except tf.errors.InvalidArgumentError:
            for path in self.files:
                _check_image(path, decode=True)
            raise


def digit_batches(path: str | None, batch_size: int, seed: int, limit: int | None = None) -> Batches:
    """MNIST as it is, 28x28x1. For the arguments and errors see `data.load_mnist`."""
    digits = load_mnist(path, quiet=True)
    train = _some((digits.x_train[..., np.newaxis], digits.y_train), limit)
    test = (digits.x_test[..., np.newaxis], digits.y_test)
    return _from_arrays(train, test, [str(i) for i in range(10)], digits.source, batch_size, seed)


def image_batches(
    source: str,
    image_size: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
    resize: bool = False,
    classes: int | None = None,
) -> Batches:
    """Color images of image_size x image_size x 3.

    Args:
        source: "digits": MNIST's, enlarged; "cifar10": Keras' loader; "synthetic": noise, to measure throughput; else
            a path: of a folder with a folder of images for each class, or of MNIST (see `data.load_mnist`).
        image_size: Height and width; every image is scaled to it.
        batch_size: Images a step.
        seed: Of order, split and noise.
        limit: Train on so many images only.
        resize: Take a folder's images even if their sizes differ.
        classes: How many classes synthetic images have (default: 1,000).

    Raises:
        DataError: naming the file or folder.
    """
    if source == "synthetic":
        return _synthetic(image_size, batch_size, seed, classes or 1000)
    if source == "cifar10":
        train, test = _cifar10()
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        return _from_arrays(_some(train, limit), test, names, "keras.datasets.cifar10", batch_size, seed, image_size)
    path = None if source == "digits" else Path(source)
    if path is not None and path.is_dir() and not any(path.glob("*-images*idx3-ubyte*")):
        return _from_folder(path, image_size, batch_size, seed, limit, resize)
    digits = load_mnist(path, quiet=True)
    train, test = (digits.x_train[..., np.newaxis], digits.y_train), (digits.x_test[..., np.newaxis], digits.y_test)
    names = [str(i) for i in range(10)]
    return _from_arrays(_some(train, limit), test, names, f"{digits.source}, enlarged", batch_size, seed, image_size)


def _some(arrays: tuple[np.ndarray, np.ndarray], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`limit` elements, evenly spread: digits may come sorted by class."""
    size = len(arrays[0])
    chosen = np.linspace(0, size - 1, min(limit or size, size)).astype(int)
    return arrays[0][chosen], arrays[1][chosen]


def _from_arrays(train, test, classes, source, batch_size, seed, image_size=None) -> Batches:
    def prepare(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images = tf.cast(images, tf.float32) / 255
        if image_size is not None:
            images = tf.image.resize(images, [image_size, image_size])
            if images.shape[-1] == 1:
                images = tf.image.grayscale_to_rgb(images)
        return images, tf.cast(labels, tf.int32)

    shuffled = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train[0]), seed=seed)
    return Batches(
        train=shuffled.batch(batch_size).map(prepare).prefetch(tf.data.AUTOTUNE),
        test=tf.data.Dataset.from_tensor_slices(test).batch(batch_size).map(prepare).prefetch(tf.data.AUTOTUNE),
        train_size=len(train[0]),
        test_size=len(test[0]),
        classes=classes,
        source=source,
    )


def _cifar10() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # Keras sets none, and would wait for minutes
    try:
        (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
    except Exception as error:  # whatever it is: Keras itself raises a bare Exception if a download fails
        raise DataError(f"no CIFAR-10: keras.datasets.cifar10 failed: {error or type(error).__name__}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return (x_train, y_train.reshape(-1)), (x_test, y_test.reshape(-1))


def _synthetic(image_size: int, batch_size: int, seed: int, classes: int) -> Batches:
    """One batch of noise, again and again: nothing is read or decoded."""
    rng = np.random.default_rng(seed)
    images = tf.constant(rng.random((batch_size, image_size, image_size, 3), np.float32))
    labels = tf.constant(rng.integers(0, classes, batch_size), tf.int32)
    batches = tf.data.Dataset.from_tensors((images, labels))
    return Batches(
        train=batches.repeat(SYNTHETIC_STEPS),
        test=batches,
        train_size=batch_size * SYNTHETIC_STEPS,
        test_size=batch_size,
        classes=[str(i) for i in range(classes)],
        source="synthetic: one batch of noise, again and again",
    )


# A folder of class folders. -------------------------------------------------------------------------------------------


def _from_folder(folder: Path, image_size, batch_size, seed, limit, resize) -> Batches:
    """Every image below folder/CLASS; of folder/train/CLASS and folder/test/CLASS, if these are there."""
    split = (folder / "train").is_dir() and (folder / "test").is_dir()
    folders = [folder / "train", folder / "test"] if split else [folder]
    classes = _classes(folders[0])
    if split and _classes(folders[1]) != classes:
        raise DataError(f"{folders[1]}: other classes than in {folders[0]}")
    files = [path for each in folders for path in _image_files(each)]
    if not split and int(TEST_FRACTION * len(files)) < 1:
        raise DataError(f"{folder}: {len(files)} images are too few to keep {TEST_FRACTION:.0%} of them for testing")
    _check_images(files, resize)

    shared = {
        "label_mode": "int",
        "class_names": classes,
        "image_size": (image_size, image_size),
        "crop_to_aspect_ratio": True,
        "batch_size": None,
        "seed": seed,
        "verbose": False,
    }
    load = keras.utils.image_dataset_from_directory
    if split:
        train, test = (load(each, shuffle=index == 0, **shared) for index, each in enumerate(folders))
    else:
        train, test = load(folder, validation_split=TEST_FRACTION, subset="both", **shared)
    if limit is not None:
        train = train.take(limit)

    def prepare(dataset: tf.data.Dataset, shuffle: bool) -> tf.data.Dataset:
        size = int(dataset.cardinality())
        if size * image_size * image_size * 3 * 4 <= CACHED_BYTES:
            dataset = dataset.cache()
        if shuffle:
            dataset = dataset.shuffle(min(size, 10_000), seed=seed)
        scaled = dataset.batch(batch_size).map(lambda images, labels: (images / 255, tf.cast(labels, tf.int32)))
        return scaled.prefetch(tf.data.AUTOTUNE)

    return Batches(
        train=prepare(train, shuffle=True),
        test=prepare(test, shuffle=False),
        train_size=int(train.cardinality()),
        test_size=int(test.cardinality()),
        classes=classes,
        source=str(folder) + ("" if split else f", {TEST_FRACTION:.0%} of it held out for testing"),
        files=files,
    )


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/**/*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _classes(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none"
        raise DataError(f"{folder}: no folder of class folders: it needs at least two folders of images, not {found}")
    for name in names:
        if not any(path.suffix.lower() in SUFFIXES for path in (folder / name).rglob("*")):
            raise DataError(f"{folder / name}: a class without images ({', '.join(SUFFIXES)})")
    return names


def _check_image(path: Path, decode: bool = False) -> tuple[int, int]:
    """The image's width and height. Raises DataError if it is none; with `decode`, if any of it is missing."""
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image.size
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for broken PNGs
        raise DataError(f"{path}: not a readable image: {error}".replace("\n", " ")) from error


def _check_images(files: list[Path], resize: bool) -> None:
    """Reads every header: minutes for a million images, where training takes days."""
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(_check_image, files))
    common = max(set(sizes), key=sizes.count)
    for path, size in zip(files, sizes, strict=True):
        if size != common and not resize:
            raise DataError(
                f"{path}: {size[0]}x{size[1]} pixels, where most have {common[0]}x{common[1]}; --resize crops and "
                "scales all to one size"
            )
