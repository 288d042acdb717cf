"""What `BatchNormHealth` does about its findings: warnings, stops, logs, files for TensorBoard, the table."""

from __future__ import annotations

import csv
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfops
from tfops.keras import BatchNormFinding, BatchNormHealth
from tfops_testing.health_models import expected_drift, fit, make_data, make_net

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def test_warns_once_for_a_layer_and_kind():
    x = make_data()
    x[:, 1] = 7
    model = make_net(momentum=0.0)
    health = BatchNormHealth()
    with pytest.warns(UserWarning, match="a batch norm") as caught:
        fit(model, health, x, epochs=3)
    (message,) = (str(each.message) for each in caught)
    assert message == ("a batch norm needs a look (epoch 0): values near zero in first.moving_variance, channel 1")
    # The next training warns anew. Channels that follow are found without a warning.
    grow = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _: model.get_layer("first").gamma.assign([1, 1, 1, 1, 1 - epoch])
    )
    with pytest.warns(UserWarning, match="a batch norm") as caught:
        fit(model, health, x, epochs=3, callbacks=[grow])
    assert len(caught) == 1
    assert [(each.epoch, each.variable, each.channels) for each in health.findings] == [
        (0, "moving_variance", (1,)),
        (1, "gamma", (4,)),
    ]


def test_warnings_name_five_places():
    stack = [tfops.keras.BatchNormalization(name=f"n{i}") for i in range(7)]
    model = keras.Sequential([keras.Input([9]), *stack])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    x = np.full([8, 9], np.nan)
    with pytest.warns(UserWarning, match="not finite") as caught:
        fit(model, BatchNormHealth(each_batch=True), x)
    (message,) = (str(each.message) for each in caught)
    assert message.startswith("a batch norm needs a look (epoch 0, batch 0): values that are not finite in n0.moving_")
    assert "n0.moving_mean, channels 0, 1, 2, 3, 4, 5, 6, 7 and 1 more; " in message
    assert re.search(r"; n\d\.\w+, channels [^;]* and \d+ more and \d+ more$", message)


def test_stops():
    x = make_data(80)
    x[17, 3] = np.nan
    health, model = BatchNormHealth("stop", each_batch=True), make_net()
    counted = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: counted.append(batch))
    with pytest.warns(UserWarning, match=r"^training stops \(epoch 0, batch 2\): values that are not finite in first"):
        history = fit(model, health, x, epochs=5, callbacks=[count])
    assert counted == [0, 1, 2]
    assert len(history["loss"]) == 1


def test_each_kind_has_its_own_action():
    x = make_data()
    x[:, 1] = 7
    model = make_net(momentum=0.0)
    health = BatchNormHealth({"dead": "log", "drift": "stop"}, data=make_data() + 9)
    with pytest.warns(UserWarning, match="drift") as caught:
        history = fit(model, health, x, epochs=4)
    assert [str(each.message).partition(" in ")[0] for each in caught] == [
        "training stops (epoch 0): drift from the batch"
    ]
    assert {each.kind for each in health.findings} == {"dead", "drift"}
    assert len(history["loss"]) == 1


def test_other_callbacks_see_the_logs(tmp_path):
    x = make_data()
    x[:, 1] = 7
    after = [
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.EarlyStopping("batch_norm_dead_channels", patience=2, mode="min"),
    ]
    history = fit(make_net(momentum=0.0), BatchNormHealth("log"), x, epochs=9, callbacks=after)
    assert history["batch_norm_dead_channels"] == [1, 1, 1]
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["batch_norm_dead_channels"] for row in rows] == ["1", "1", "1"]
    assert [row["batch_norm_nonfinite_channels"] for row in rows] == ["0", "0", "0"]


def _events(folder):
    """By tag, the step and value of each event: a number, or a histogram's array of left, right and count."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    module = pytest.importorskip(name, reason="needs tensorboard")
    events = module.EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


@pytest.mark.parametrize("every", [None, 2])
def test_tensorboard_shows_what_numpy_computes(tmp_path, every):
    """At each step, compared with the variables at that time. NaN is left out of histograms."""
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    model, data = make_net(rate=0.1, momentum=0.5), make_data() + 1
    taken = {}

    def take(step):
        state = {}
        for name, x in (("first", data), ("second", keras.Model(model.input, model.get_layer("dense").output)(data))):
            layer = model.get_layer(name)
            mean_drift, variance_drift = expected_drift(x, layer, 0)
            state[name] = {
                "gamma": layer.gamma.numpy(),
                "moving_variance": layer.moving_variance.numpy(),
                "mean_drift": mean_drift,
                "variance_drift": variance_drift,
            }
        taken[step] = state

    batches = []

    def after_batch(batch, logs):
        batches.append(batch)
        if every and len(batches) % every == 0:
            take(len(batches))

    keeper = keras.callbacks.LambdaCallback(
        on_train_batch_end=after_batch,
        on_epoch_end=lambda epoch, _: take(epoch if every is None else len(batches)),
    )
    health = BatchNormHealth("log", data=data, every=every, log_dir=tmp_path)
    history = fit(model, health, make_data(), epochs=3, callbacks=[keeper])
    steps = [0, 1, 2] if every is None else [2, 3, 4, 6, 8, 9]
    events = _events(tmp_path)
    assert sorted(taken) == steps
    for tag, found in events.items():
        assert [step for step, _ in found] == steps, tag
    for name in ("first", "second"):
        scalars = {
            "nonfinite_channels": lambda state: 0,
            "dead_channels": lambda state: 0,
            "drift_channels": lambda state: np.sum(
                (np.abs(state["mean_drift"]) > 1) | (np.abs(state["variance_drift"]) > 1)
            ),
            "largest_mean_drift": lambda state: np.abs(state["mean_drift"]).max(),
            "largest_variance_drift": lambda state: np.abs(state["variance_drift"]).max(),
        }
        for scalar, compute in scalars.items():
            for step, value in events[f"batch_norm/{name}/{scalar}"]:
                np.testing.assert_allclose(value, compute(taken[step][name]), rtol=1e-4, atol=1e-6)
        for step in steps:
            for variable, values in taken[step][name].items():
                histogram = dict(events[f"batch_norm/{name}/{variable}"])[step]
                assert histogram[:, 2].sum() == len(values)
                np.testing.assert_allclose(histogram[0, 0], values.min(), rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(histogram[-1, 1], values.max(), rtol=1e-4, atol=1e-6)
    assert len(events) == 5 + 2 * (5 + 4)
    last = dict(events["batch_norm/largest_mean_drift"])[steps[-1]]
    np.testing.assert_allclose(last, history["batch_norm_largest_mean_drift"][-1], rtol=1e-6)


def test_tensorboard_of_channels_that_are_not_finite(tmp_path):
    x = make_data()
    x[1, 3] = np.nan
    fit(make_net(), BatchNormHealth("log", each_batch=True, log_dir=tmp_path), x)
    events = _events(tmp_path)
    ((step, count),) = events["batch_norm/first/nonfinite_channels"]
    assert (step, count) == (0, 5)  # through their gammas and betas, of which NaN has come by the gradient
    ((_, histogram),) = events["batch_norm/first/moving_variance"]
    assert histogram[:, 2].sum() == 4


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(make_net(), BatchNormHealth(), make_data())
    assert list(tmp_path.iterdir()) == []


def test_folder_needs_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="log_dir needs the package tensorboard, which is not installed"):
        BatchNormHealth(log_dir=tmp_path)
    BatchNormHealth()


def test_findings_are_told_as_a_table():
    health = BatchNormHealth()
    health.findings = [
        BatchNormFinding(0, 11, "norm", "nonfinite", "gamma", (0, 2), (np.nan, np.nan)),
        BatchNormFinding(10, None, "block/norm", "drift", "moving_mean", tuple(range(9)), (1.5, -2.25, *[3.0] * 7)),
    ]
    assert health.report().splitlines() == [
        "epoch  batch  layer       kind       variable     channels                           values",
        "    0     11  norm        nonfinite  gamma        0, 2                               nan",
        "   10         block/norm  drift      moving_mean  0, 1, 2, 3, 4, 5, 6, 7 and 1 more  1.5, -2.25, 3",
    ]


def test_looks_every_so_many_batches():
    """Counted over epochs, of 3 batches each; the end of an epoch that has just been looked at is not another."""
    x = make_data()
    seen = []
    model = make_net()
    health = BatchNormHealth("log", every=2)
    plant = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: (
            seen.append(batch) or (len(seen) == 4 and model.get_layer("second").gamma.assign([1, 0, 1, 1]))
        )
    )
    history = fit(model, health, x, epochs=2, callbacks=[plant])
    assert [tuple(each[:3]) for each in health.findings] == [(1, 0, "second")]
    assert history["batch_norm_dead_channels"] == [0, 1]


def test_model_without_batch_norm_is_warned_of():
    model = keras.Sequential([keras.Input([5]), layers.Dense(1)], name="plain")
    model.compile("sgd", "mse", jit_compile=False)
    with pytest.warns(UserWarning, match="BatchNormHealth has nothing to watch: plain has no batch norm"):
        history = fit(model, BatchNormHealth(data=make_data(), each_batch=True), make_data())
    assert history["batch_norm_dead_channels"] == [0]


@pytest.mark.parametrize("action", ["raise", None, {"dead": "raise"}, {"alive": "stop"}], ids=str)
def test_bad_action_is_named(action):
    message = (
        "action must be one of 'log', 'warn', 'stop', or a dict of these with keys among 'nonfinite', 'dead', 'drift', "
        f"but it is {action!r}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        BatchNormHealth(action)


@pytest.mark.parametrize("every", [0, -1, 1.5, "epoch"])
def test_bad_every_is_named(every):
    with pytest.raises(ValueError, match=re.escape(f"every must be an integer >= 1 or None, but it is {every!r}")):
        BatchNormHealth(every=every)


@pytest.mark.parametrize("name", ["scale", "variance", "drift"])
@pytest.mark.parametrize("value", [-1, np.nan, np.inf, "x", None])
def test_bad_threshold_is_named(name, value):
    message = f"{name}_threshold must be a finite number >= 0, but it is {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        BatchNormHealth(**{f"{name}_threshold": value})
