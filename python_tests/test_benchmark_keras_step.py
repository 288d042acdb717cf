"""keras_step.py measures the MNIST network, and what it folds into batch norms leaves a network as it is."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import keras
import tensorflow as tf

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "keras_step.py"


def test_mnist(tmp_path):
    out = tmp_path / "out"
    options = ["--network", "mnist", "--seconds", "0.1", "--threads", "1", "--out", str(out)]
    command = [sys.executable, str(SCRIPT), *options]
    run = subprocess.run(command, cwd=sys.prefix, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert out.with_suffix(".md").read_text() in run.stdout
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["threads"] == 1
    (row,) = report["rows"]
    assert row["rounds"] >= 5
    assert row["batch_norms"] == row["folded_activations"] == 4
    assert row["folded_additions"] == 0
    assert row["error"] < 1e-4
    assert set(row["step"]) == {"keras", "xla", "tfops", "fused", "xla_fused", "without"}
    assert all(median > 0 for median, _ in row["step"].values())
    assert all(share < 1 for share, _ in row["share"].values())


def test_folds(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("keras_step")
    layers = keras.layers
    x = keras.Input((4, 4, 8))
    y = layers.Add(name="of_norms")([layers.BatchNormalization()(x), layers.BatchNormalization(name="second")(x)])
    y = layers.Activation("tanh", name="other_activation")(y)
    norm = layers.BatchNormalization(name="read_twice")(y)
    y = layers.Add(name="no_norm")([norm, layers.ReLU(name="relu")(norm)])
    y = layers.Add(name="alone")([layers.BatchNormalization(name="third")(y), y])
    y = layers.Add(name="one_too_many")([y, x])
    y = layers.Add(name="before_relu6")([layers.BatchNormalization(name="fourth")(y), y])
    y = layers.ReLU(6, name="relu6")(y)
    norm = layers.BatchNormalization(name="output")(y)
    model = keras.Model(x, [norm, layers.ReLU(name="another_relu")(norm)])

    folds = script.plan_folds(model)
    assert folds.additions == {"of_norms": ("second", 1), "alone": ("third", 0), "before_relu6": ("fourth", 0)}
    assert folds.activations == {"relu6": "fourth"}
    for norm in filter(script.is_norm, model.layers):
        norm.gamma.assign(tf.random.uniform([8], 0.5, 1.5))
        norm.beta.assign(tf.random.normal([8]))
    fused = script.copy_variables(model, script.fuse(model, folds))
    images = tf.random.normal([3, 4, 4, 8])
    for training in (True, False):
        for got, want in zip(fused(images, training=training), model(images, training=training), strict=True):
            tf.debugging.assert_near(got, want, atol=1e-4)
