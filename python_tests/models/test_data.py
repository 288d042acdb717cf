"""trainer.image_data reads digits, CIFAR-10 and folders of images, or says in a line what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from tfops_testing.models_data import draw_arrays, run_program
from trainer import alexnet_options
from trainer.data import DataError, UserError
from trainer.image_data import digit_batches, image_batches


def gather(dataset) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def save_images(folder: Path, count: int = 10, size: tuple[int, int] = (12, 12)) -> None:
    """Red, green and blue images, in class folders of these names, in three formats."""
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.zeros((*size, 3), np.uint8)
            pixels[..., channel] = 200 + index
            Image.fromarray(pixels).save(folder / name / f"{index}{('.png', '.bmp', '.PNG')[index % 3]}")


@pytest.fixture(scope="module")
def arrays():
    return draw_arrays(50, 20)


@pytest.fixture
def npz(arrays, tmp_path) -> Path:
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz"


def test_digits_come_once_each_in_an_order_for_each_pass(arrays, npz):
    data = digit_batches(npz, 16, seed=3)
    assert (data.train_size, data.test_size, data.steps) == (50, 20, 4)
    first, again = gather(data.train), gather(data.train)
    assert (first[1] != again[1]).any()  # every pass has its order
    for images, labels in (first, again):
        assert images.dtype == np.float32
        assert images.shape == (50, 28, 28, 1)
        assert labels.dtype == np.int32
        order = np.lexsort(images.reshape(50, -1).T)
        want = arrays["x_train"].reshape(50, -1).astype(np.float32) / 255
        order_of_want = np.lexsort(want.T)
        np.testing.assert_allclose(images.reshape(50, -1)[order], want[order_of_want], rtol=1e-6)
        np.testing.assert_array_equal(labels[order], arrays["y_train"][order_of_want])
    images, labels = gather(data.test)
    np.testing.assert_array_equal(labels, arrays["y_test"])
    np.testing.assert_allclose(images[..., 0], arrays["x_test"] / 255, rtol=1e-6)
    np.testing.assert_array_equal(gather(digit_batches(npz, 16, seed=3).train)[1], first[1])


def test_limit_takes_digits_from_all_of_the_data(arrays, npz):
    _, labels = gather(digit_batches(npz, 16, seed=0, limit=5).train)
    np.testing.assert_array_equal(np.sort(labels), np.sort(arrays["y_train"][[0, 12, 24, 36, 49]]))


def test_enlarged_digits_are_interpolated(arrays, npz):
    images, labels = gather(image_batches(str(npz), 67, 8, seed=0).test)
    assert images.shape == (20, 67, 67, 3)
    np.testing.assert_array_equal(labels, arrays["y_test"])
    for channel in range(3):
        np.testing.assert_array_equal(images[..., channel], images[..., 0])
    for image, digit in zip(images, arrays["x_test"], strict=True):
        np.testing.assert_allclose(image.mean(), digit.mean() / 255, rtol=0.02)
        enlarged = np.asarray(Image.fromarray(digit).resize((67, 67), Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(image[..., 0], enlarged, atol=0.01)


def test_cifar10_is_read(monkeypatch):
    rng = np.random.default_rng(0)
    splits = [(rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, (n, 1))) for n in (12, 6)]
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: splits)
    data = image_batches("cifar10", 32, 5, seed=0)
    images, labels = gather(data.test)
    np.testing.assert_allclose(images, splits[1][0] / 255, rtol=1e-6)
    np.testing.assert_array_equal(labels, splits[1][1][:, 0])
    assert len(data.classes) == 10

    def fail():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", fail)
    with pytest.raises(DataError, match=r"no CIFAR-10: keras.datasets.cifar10 failed: URL fetch failure"):
        image_batches("cifar10", 32, 5, seed=0)


def test_synthetic_images_are_made():
    data = image_batches("synthetic", 67, 4, seed=0, classes=30)
    images, labels = gather(data.train)
    assert images.shape == (4 * data.steps, 67, 67, 3)
    assert 0 <= images.min() < images.max() < 1
    assert labels.max() < len(data.classes) == 30


@pytest.mark.parametrize("split", [False, True])
def test_class_folders_are_read(tmp_path, split):
    for name in ("train", "test") if split else (".",):
        save_images(tmp_path / name)
    data = image_batches(str(tmp_path), 20, 7, seed=0)
    assert data.classes == ["blue", "green", "red"]
    assert (data.train_size, data.test_size) == ((30, 30) if split else (24, 6))
    seen = []
    for images, labels in (gather(data.train), gather(data.test)):
        assert images.shape[1:] == (20, 20, 3)
        for image, label in zip(images, labels, strict=True):
            channel = 2 - label
            np.testing.assert_allclose(image[..., channel], image[0, 0, channel], rtol=1e-5)
            assert image[..., channel].min() >= 200 / 255 - 1e-6
            assert image.sum(-1).max() == image[..., channel].max()
            seen.append((int(label), round(float(image[0, 0, channel] * 255))))
    assert sorted(seen) == sorted([(label, 200 + i) for label in range(3) for i in range(10)] * (2 if split else 1))


def assert_error(message: str, folder: Path, **arguments) -> None:
    with pytest.raises(DataError, match="^" + re.escape(message)):
        image_batches(str(folder), 20, 7, seed=0, **arguments)


def test_bad_folders_are_named(tmp_path):
    assert_error(f"{tmp_path / 'none'}: no such file or folder", tmp_path / "none")
    assert_error(f"{tmp_path}: no folder of class folders: it needs at least two folders of images, not none", tmp_path)
    (tmp_path / "one").mkdir()
    assert_error(f"{tmp_path}: no folder of class folders: it needs at least two folders of images, not only", tmp_path)
    save_images(tmp_path / "good")
    (tmp_path / "good" / "empty").mkdir()
    assert_error(f"{tmp_path / 'good' / 'empty'}: a class without images", tmp_path / "good")
    save_images(tmp_path / "split" / "train")
    save_images(tmp_path / "split" / "test")
    save_images(tmp_path / "split" / "test" / "more")
    assert_error(f"{tmp_path / 'split' / 'test'}: other classes than in", tmp_path / "split")
    save_images(tmp_path / "few", count=1)
    assert_error(f"{tmp_path / 'few'}: 3 images are too few", tmp_path / "few")


def test_mixed_sizes_need_resize(tmp_path):
    save_images(tmp_path)
    odd = tmp_path / "green" / "odd.png"
    Image.fromarray(np.zeros((9, 30, 3), np.uint8)).save(odd)
    assert_error(f"{odd}: 30x9 pixels, where most have 12x12; --resize", tmp_path)
    data = image_batches(str(tmp_path), 20, 7, seed=0, resize=True)
    assert data.train_size + data.test_size == 31


def test_files_that_are_no_images_are_named(tmp_path):
    save_images(tmp_path)
    odd = tmp_path / "green" / "odd.png"
    odd.write_text("not an image")
    assert_error(f"{odd}: not a readable image", tmp_path)


@pytest.mark.parametrize("style", ["graph", "keras"])
def test_broken_image_is_named(tmp_path, style):
    """Its header is fine: it is found when it is decoded."""
    save_images(tmp_path / "data")
    odd = tmp_path / "data" / "green" / "odd.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)).save(odd)
    odd.write_bytes(odd.read_bytes()[:200])
    arguments = ["--data", "data", "--image-size", 67, "--width", 0.0625, "--batch-size", 8, "--epochs", 1]
    run = run_program(f"alexnet_{style}", *arguments, cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert run.stderr.splitlines()[-1].startswith(f"train.py alexnet_{style}: data/green/odd.png: not a readable image")
    assert "Traceback" not in run.stderr


def test_fewer_classes_than_the_data_have_are_refused(npz):
    options = alexnet_options.parse(["--data", str(npz), "--classes", "9", "--image-size", "67"], "keras")
    with pytest.raises(UserError, match=r"--classes must be at least 10, as .* has, not 9"):
        alexnet_options.read_data(options)


def test_too_small_images_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        alexnet_options.parse(["--image-size", "66"], "graph")
    assert error.value.code == 2
    assert "--image-size: must be at least 67, not 66" in capsys.readouterr().err
