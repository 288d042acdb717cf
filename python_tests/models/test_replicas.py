"""trainer.replicas: two replicas compute what one device does with the whole batch, and survive a lost worker."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfops_testing.models_data import command, draw_arrays, environment, run_program
from tfops_testing.replica_check import SHARES, batch_of, build

CHECK = ["-m", "tfops_testing.replica_check"]
WITHOUT_ONEDNN = {"TF_ENABLE_ONEDNN_OPTS": "0"}  # its convolution of an empty batch has a wrong shape
PATIENCE = 180  # seconds, for what takes some ten


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def processes(commands: list[list[str]], environments: list[dict], cwd: Path):
    """Starts them all, and leaves none behind."""
    logs = [cwd / f"process_{i}.log" for i in range(len(commands))]
    started = []
    try:
        for each, variables, log in zip(commands, environments, logs, strict=True):
            with log.open("a") as file:
                started.append(subprocess.Popen(each, env=variables, cwd=cwd, stdout=file, stderr=subprocess.STDOUT))
        yield started, logs
    finally:
        for process in started:
            process.kill()
            process.wait()


def wait(process: subprocess.Popen, log: Path) -> int:
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done in {PATIENCE} s:\n{log.read_text()[-3000:]}")


def one_device(norm: str) -> list[tuple[float, list[np.ndarray]]]:
    """Loss and weights after every step of one device with the whole batch; last, the loss of the test."""
    model = build(norm, synchronized=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    results = []
    for step in range(len(SHARES)):
        images, labels = batch_of(step)
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        model.optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        results.append((float(value), model.get_weights()))
    images, labels = batch_of(len(SHARES))
    return [*results, (float(loss(labels, model(images, training=False))), [])]


def check(path: Path, want: list[tuple[float, list[np.ndarray]]]) -> None:
    got = np.load(path)
    for step, (loss, weights) in enumerate(want[:-1]):
        total, _, count = got[f"totals_{step}"]
        assert count == sum(SHARES[step])
        np.testing.assert_allclose(total / count, loss, rtol=1e-5)
        for index, weight in enumerate(weights):
            np.testing.assert_allclose(got[f"weight_{step}_{index}"], weight, rtol=1e-5, atol=1e-5)
    total, right, count = got["totals_test"]
    np.testing.assert_allclose(total / count, want[-1][0], rtol=1e-5)
    assert 0 <= right <= count == 4


@pytest.mark.parametrize("norm", ["tfops", "keras"])
def test_two_logical_devices_agree_with_one(norm, tmp_path):
    run = [sys.executable, *CHECK, "mirrored", norm, "out.npz"]
    with processes([run], [environment(**WITHOUT_ONEDNN)], tmp_path) as ((process,), (log,)):
        assert wait(process, log) == 0, log.read_text()[-3000:]
    check(tmp_path / "out.npz", one_device("keras"))


def test_two_processes_agree_with_one(tmp_path):
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    commands, environments = [], []
    for index in range(2):
        config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        commands.append([sys.executable, *CHECK, "workers", "tfops", f"out_{index}.npz"])
        environments.append(environment(TF_CONFIG=json.dumps(config), **WITHOUT_ONEDNN))
    with processes(commands, environments, tmp_path) as (started, logs):
        for process, log in zip(started, logs, strict=True):
            assert wait(process, log) == 0, log.read_text()[-3000:]
    want = one_device("keras")
    for index in range(2):
        check(tmp_path / f"out_{index}.npz", want)


@pytest.mark.slow
def test_devices_option_learns_and_resumes(tmp_path):
    """Two logical devices learn what one does, and go on from a checkpoint."""
    np.savez(tmp_path / "mnist.npz", **draw_arrays(1000, 110))
    shared = ["--data", "mnist.npz", "--devices", 2, "--batch-size", 45, "--out", "run"]
    first = run_program("mnist_keras", *shared, "--epochs", 2, cwd=tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    again = run_program("mnist_keras", *shared, "--epochs", 4, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Resuming after 2 epochs" in again.stdout
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [each["epoch"] for each in history["epochs"]] == [1, 2, 3, 4]
    assert history["epochs"][2]["loss"] < 0.5 * history["epochs"][0]["loss"]  # not from the beginning
    assert history["epochs"][-1]["test_accuracy"] > 0.7
    assert (tmp_path / "run" / "report.md").exists()


@pytest.mark.exclusive
def test_lost_worker_is_noticed_and_both_resume(tmp_path):
    """One of two processes is killed: the other says so in bounded time, and both go on from the last epoch."""
    np.savez(tmp_path / "mnist.npz", **draw_arrays(300, 60))
    timeout = 20

    def commands(*more: object) -> list[list[str]]:
        workers = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
        shared = ["--data", "mnist.npz", "--batch-size", 100, "--out", "run", "--timeout", timeout]
        shared += ["--workers", workers, *more]
        return [command("mnist_keras", *shared, "--index", index) for index in range(2)]

    history = tmp_path / "run" / "history.json"
    with processes(commands("--epochs", 1000), [environment()] * 2, tmp_path) as (started, logs):
        deadline = time.monotonic() + PATIENCE
        while not (history.exists() and len(json.loads(history.read_text())["epochs"]) >= 2):
            assert time.monotonic() < deadline, logs[0].read_text()[-3000:]
            assert started[0].poll() is None, logs[0].read_text()[-3000:]
            time.sleep(0.1)
        started[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert wait(started[0], logs[0]) == 3, logs[0].read_text()[-3000:]
        assert time.monotonic() - killed < 2 * timeout + 20
        last = logs[0].read_text().splitlines()[-1]
        wanted = r"train.py mnist_keras: worker 0: another worker died or does not answer \(\w+\); start"
        assert re.match(wanted, last), last

    done = len(json.loads(history.read_text())["epochs"])
    for log in logs:
        log.unlink()
    with processes(commands("--epochs", done + 2, "--resume"), [environment()] * 2, tmp_path) as (started, logs):
        for process, log in zip(started, logs, strict=True):
            assert wait(process, log) == 0, log.read_text()[-3000:]
    match = re.search(r"Resuming after (\d+) epochs", logs[0].read_text())
    assert match, logs[0].read_text()
    assert int(match[1]) in (done, done + 1)
    assert [each["epoch"] for each in json.loads(history.read_text())["epochs"]][-1] == done + 2
    assert (tmp_path / "run" / "model" / "saved_model.pb").exists()
