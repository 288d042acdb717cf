"""Runs of the package trainer: interrupted and resumed, repeated, reported, exported and read again."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tfops_testing.models_data import command, draw_arrays, draw_digits, environment, run_program
from trainer.data import UserError

STYLES = ("graph", "keras")
ALEXNET = ["--image-size", 67, "--width", 0.0625, "--batch-size", 25]


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "mnist.npz"
    np.savez(path, **draw_arrays(1000, 200))
    return path


def train(module: str, *arguments: object):
    """In this process, with its devices."""
    models = importlib.import_module(f"trainer.{module}")
    return models.train(models.parse_arguments([str(each) for each in arguments]))


def history(folder: Path) -> dict:
    return json.loads((folder / "history.json").read_text())


@pytest.fixture(scope="module", params=STYLES)
def run(request, npz, tmp_path_factory):
    """A short run: style, folder, what it printed is not kept."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    train(f"mnist_{request.param}", "--data", npz, "--epochs", 5, "--batch-size", 50, "--out", folder, "--profile")
    return request.param, folder


def tags(logs: Path) -> set[str]:
    """Of all events in the folder and below."""
    found = set()
    for path in logs.rglob("events.*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            found |= {value.tag for value in event.summary.value}
    return found


def test_runs_write_history_logs_and_pictures(run):
    style, folder = run
    epochs = history(folder)["epochs"]
    assert [each["epoch"] for each in epochs] == [1, 2, 3, 4, 5]
    assert epochs[-1]["loss"] < 0.3 * epochs[0]["loss"]
    assert epochs[-1]["test_accuracy"] > 0.95
    assert epochs[0]["learning_rate"] > epochs[-1]["learning_rate"] >= 0
    moving = history(folder)["moving"]
    assert len(moving) == 100  # one a step
    assert {each for each in moving[0] if each != "step"} == {"norm_1", "norm_2", "norm_3"}
    assert moving[0]["norm_1"]["variance"] != moving[-1]["norm_1"]["variance"]
    report = (folder / "report.md").read_text()
    for name in ("curves.png", "wrong.png", "moving.png"):
        assert f"]({name})" in report
        with Image.open(folder / name) as image:
            image.load()
            assert image.width > 100
            assert len(set(image.convert("L").tobytes())) > 10  # something is drawn
    assert f"{epochs[-1]['test_accuracy']:.2%}" in report
    assert list((folder / "logs").rglob("*.xplane.pb"))  # the profile
    if style == "graph":
        names = ["loss", "accuracy", "learning_rate", "test_loss", "test_accuracy"]
        names += [f"norm_1/{each}" for each in ("gamma", "beta", "moving_mean", "moving_variance")]
        wanted = {f"log/{name}" for name in names}
    else:
        pytest.importorskip("tensorboard", reason="needs tensorboard")
        wanted = {"epoch_loss", "epoch_accuracy", "epoch_learning_rate"}
        seen = tags(folder / "logs")
        for each in ("gamma", "beta", "moving_mean", "moving_variance"):
            assert any(each in tag for tag in seen)
    assert wanted <= tags(folder / "logs")


def test_exported_model_predicts_pngs(run, npz, tmp_path):
    """The exported model reads PNGs: as MNIST's, and black on white."""
    _, folder = run
    images, labels = draw_digits(20, np.random.default_rng(5))
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image if index % 2 else 255 - image).save(tmp_path / f"{index:02}_{label}.png")
    result = run_program("predict", folder / "model", tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 20
    right = 0
    for line, label in zip(lines, labels, strict=True):
        path, *said = line.split()
        assert Path(path).name.endswith(f"_{label}.png")
        assert len(said) == 6
        chances = [float(each.rstrip("%")) for each in said[1::2]]
        assert chances == sorted(chances, reverse=True)
        right += said[0] == str(label)
    assert right >= 16


def test_bad_input_of_predict_is_named(run, tmp_path, capsys):
    from trainer import predict

    _, folder = run

    def message(*arguments: object) -> str:
        assert predict.main([str(each) for each in arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.png"
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:50])
    assert f"{tmp_path / 'none.png'}: no such file" in message(folder / "model", tmp_path / "none.png")
    assert f"{tmp_path / 'empty'}: no images" in message(folder / "model", tmp_path / "empty")
    assert f"{broken}: not a readable image" in message(folder / "model", broken)
    assert f"{tmp_path / 'empty'}: not a model" in message(tmp_path / "empty", broken)


@pytest.mark.parametrize("style", STYLES)
def test_killed_run_loses_at_most_one_epoch(style, npz, tmp_path):
    """A killed run loses at most the epoch that it was in."""
    folder = tmp_path / "run"
    shared = ["--data", npz, "--limit", 300, "--batch-size", 50, "--out", folder]
    process = subprocess.Popen(
        command(f"mnist_{style}", *shared, "--epochs", 1000),
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not ((folder / "history.json").exists() and len(history(folder)["epochs"]) >= 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = history(folder)["epochs"]
    run = train(f"mnist_{style}", *shared, "--epochs", len(before) + 2, "--resume")
    after = history(folder)["epochs"]
    assert [each["epoch"] for each in after] == list(range(1, len(before) + 3))
    kept = len(before) - 1  # the last one may be in the history and not yet in a checkpoint
    assert after[:kept] == before[:kept]
    assert 2 * 6 <= len(run.step_seconds) <= 4 * 6
    assert after[kept]["loss"] < 0.7 * after[0]["loss"]  # not from the beginning


@pytest.mark.parametrize("style", STYLES)
def test_seed_repeats_a_run_to_the_bit(style, npz, tmp_path):
    losses = []
    for index, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(index)
        keras.backend.clear_session()
        arguments = ["--limit", 400, "--batch-size", 50, "--epochs", 1, "--seed", seed, "--out", folder]
        train(f"mnist_{style}", "--data", npz, *arguments)
        content = history(folder)
        losses.append([(each["loss"], each["test_loss"]) for each in content["epochs"]] + content["moving"])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("style", STYLES)
def test_checkpoints_of_another_model_are_refused(style, npz, tmp_path):
    folder = tmp_path / "run"
    alexnet = ["--data", npz, "--limit", 50, *ALEXNET, "--epochs", 1, "--out", folder]
    train(f"alexnet_{style}", *alexnet)
    with pytest.raises(UserError, match="a run of another model: its model is 'AlexNet', not 'MNIST'"):
        train(f"mnist_{style}", "--data", npz, "--out", folder, "--resume")
    # The same, if the history does not tell.
    content = history(folder)
    content["settings"]["width"] = 0.125
    (folder / "history.json").write_text(json.dumps(content))
    again = [*alexnet, "--width", 0.125, "--epochs", 2, "--resume"]
    with pytest.raises(UserError, match=rf"^{folder}/checkpoints/\S+: not a checkpoint of this model"):
        train(f"alexnet_{style}", *again)
    (folder / "history.json").write_text("{")
    with pytest.raises(UserError, match=rf"^{folder}/history.json: not a run's history"):
        train(f"alexnet_{style}", *again)


def test_folder_with_something_else_is_left_alone(npz, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty, and no run of these models; name another folder with --out"):
        train("mnist_graph", "--data", npz, "--out", tmp_path)
    assert (tmp_path / "logs" / "mine.txt").read_text() == "keep"


def test_split_devices_agree_with_one(npz, tmp_path):
    """The graph on one device and loss and optimization on the other compute what one device does, and are there."""
    shared = ["--data", npz, "--limit", 200, "--epochs", 1]
    train("mnist_graph", *shared, "--out", tmp_path / "one")
    split = ["--logical-cpus", 2, "--split-devices", "/cpu:0,/cpu:1", "--log-device-placement", "--out", "split"]
    run = run_program("mnist_graph", *shared, *split, cwd=tmp_path, TF_CPP_MIN_LOG_LEVEL="0")
    assert run.returncode == 0, run.stderr[-2000:]
    losses = [history(tmp_path / each)["epochs"][0]["loss"] for each in ("one", "split")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    placed = (run.stdout + run.stderr).splitlines()
    for op, device in (("convolution_1/kernel", "CPU:0"), ("probabilities", "CPU:0"), ("loss", "CPU:1")):
        assert any(line.lstrip().startswith(f"{op}:") and line.endswith(device) for line in placed), op


@pytest.mark.parametrize("style", STYLES)
def test_alexnet_learns(style, npz, tmp_path):
    arguments = ["--data", npz, *ALEXNET, "--width", 0.125, "--epochs", 4, "--out", tmp_path / "run"]
    run = train(f"alexnet_{style}", *arguments, "--learning-rate", 0.03)
    assert run.epochs[-1]["loss"] < 0.85 * run.epochs[0]["loss"]
    assert run.best > 0.25
