"""`python -m tfops.gradcheck`: the op's gradients are right, and a wrong one does not pass."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf

import tfops
from tfops import gradcheck
from tfops.gradcheck import _op
from tfops_testing import kernel_cases
from tfops_testing.fresh_process import run_python


@pytest.mark.parametrize("layout", _op.LAYOUTS)
@pytest.mark.parametrize("mode", _op.MODES)
def test_gradients_agree(layout, mode):
    for result in gradcheck.check_op(gradcheck.Case(layout, mode, "relu6", residual=True), seed=7):
        assert result.passed, result


def test_reference_has_the_same_gradients():
    case = gradcheck.Case("NCHW", "moving", "silu", residual=True)
    for result in gradcheck.check_op(case, function=tfops.reference.fused_batch_norm):
        assert result.passed, result


def test_check_takes_cases():
    case = gradcheck.Case("NC", "inference")
    assert gradcheck.check(case, ["float32"], seed=3) == gradcheck.check_op(case, ["float32"], seed=3)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("mode", _op.MODES)
@pytest.mark.parametrize("layout", _op.LAYOUTS)
def test_inputs_keep_away_from_kinks_and_are_exact_in_every_dtype(layout, mode, residual):
    case = gradcheck.Case(layout, mode, None, residual)
    for seed in range(5):
        inputs = _op.draw_inputs(case, np.random.default_rng(seed))
        for name, value in inputs.items():
            for dtype in _op.DTYPES:
                np.testing.assert_array_equal(tf.cast(tf.cast(value, dtype), tf.float64), value, f"{name}, {dtype}")

        # The activation's argument by NumPy, not by the program's own formula: channels last, one row an element.
        x, added = (
            np.moveaxis(inputs[name], case.channel_axis, -1).reshape(-1, len(inputs["scale"]))
            for name in ("x", "residual")
        )
        given = mode == "inference"
        mean, variance = (inputs["mean"], inputs["variance"]) if given else (x.mean(axis=0), x.var(axis=0))
        z = (x - mean) / np.sqrt(variance + _op.EPSILON) * inputs["scale"] + inputs["offset"]
        z = z + added if residual else z
        assert np.abs(z).min() > _op.KINK_MARGIN
        assert np.abs(z - 6).min() > _op.KINK_MARGIN
        for piece in (z < 0, (z > 0) & (z < 6), z > 6):
            assert piece.any(axis=0).all()


def test_command_line_checks_every_combination(tmp_path):
    report = tmp_path / "report.json"
    run = run_python("-m", "tfops.gradcheck", "--json", str(report))
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    cases = 3 * 3 * len(kernel_cases.NAMES) * 2  # layouts, modes, activations, residual
    assert lines[-1].startswith(f"{4 * cases} of {4 * cases} combinations passed on ")
    assert sum(line.endswith("  ok") for line in lines) == cases

    content = json.loads(report.read_text())
    assert content["passed"]
    results = content["results"]
    combinations = {
        tuple(result[key] for key in ("dtype", "layout", "mode", "activation", "residual")) for result in results
    }
    assert len(combinations) == len(results) == 4 * cases
    for result in results:
        wanted = {"x", "scale", "offset"}
        wanted |= {"residual"} if result["residual"] else set()
        wanted |= {"mean", "variance"} if result["mode"] != "training" else set()
        assert set(result["errors"]) == wanted
        if result["dtype"] == "float64":
            assert max(result["errors"].values()) < 1e-6


def test_options_choose_the_combinations(capsys):
    arguments = [
        "--dtype",
        "float64",
        "float16",
        "--layout",
        "NC",
        "--mode",
        "inference",
        "--activation",
        "none",
        "silu",
    ]
    assert gradcheck.main([*arguments, "--residual", "with", "--device", "cpu", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines if line.endswith("  ok")] == [
        ["NC", "inference", "none", "with"],
        ["NC", "inference", "silu", "with"],
    ]
    assert lines[-1].startswith("4 of 4 combinations passed on CPU:0 in ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dtype", "int8"], "int8"),
        (["--activation", "softsign"], "softsign"),
        (["--seed", "-1"], "-1"),
        (["--device", "tpu:3"], "tpu:3"),
        (["--json", os.path.join("no", "such", "folder")], os.path.join("no", "such", "folder")),
        (["--speed"], "--speed"),
        (["--function", "json:dumps", "--layout", "NC"], "--layout: means nothing beside --function"),
        (["--function", "json"], "must be MODULE:NAME, not 'json'"),
        (["--function", "no_such_module:name"], "no_such_module"),
        (["--function", "json:no_such_name"], "no_such_name"),
        (["--function", "json:__name__"], "json:__name__ must be (function, inputs) or a dict of check's arguments"),
    ],
)
def test_bad_arguments_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as error:
        gradcheck.main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("python -m tfops.gradcheck: error: ")
    assert named in message


def test_bad_arguments_exit_with_2():
    assert run_python("-m", "tfops.gradcheck", "--dtype", "int8").returncode == 2


@pytest.mark.parametrize("field", ["layout", "mode", "activation"])
def test_case_rejects_unknown_values(field):
    with pytest.raises(ValueError, match=f"{field} must be one of .* (not|but it is) 'nope'"):
        gradcheck.Case(**{field: "nope"})
    with pytest.raises(ValueError, match=r"dtypes must be among .* not 'int8'"):
        gradcheck.check_op(gradcheck.Case(), ["int8"])


def with_gradient_of(name: str, change):
    """The op with the gradient of one input passed through `change`."""

    @tf.custom_gradient
    def changed(tensor):
        return tf.identity(tensor), change

    def function(x, scale, offset, mean=None, variance=None, *, residual=None, **options):
        inputs = {"x": x, "scale": scale, "offset": offset, "mean": mean, "variance": variance, "residual": residual}
        inputs[name] = changed(inputs[name])
        return tfops.fused_batch_norm(**inputs, **options)

    return function


@pytest.mark.parametrize("name", _op.INPUTS)
@pytest.mark.parametrize(
    ("dtype", "excess"), [("float64", 2e-6), ("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 2e-2)]
)
def test_wrong_gradient_is_caught(name, dtype, excess, monkeypatch, capsys):
    arguments = [
        "--dtype",
        dtype,
        "--layout",
        "NC",
        "--mode",
        "inference",
        "--activation",
        "relu",
        "--residual",
        "with",
    ]
    assert gradcheck.main(arguments) == 0
    spoil = with_gradient_of(name, lambda gradient: gradient * tf.cast(1 + excess, gradient.dtype))
    monkeypatch.setattr(_op, "fused_batch_norm", spoil)
    assert gradcheck.main(arguments) == 1
    output = capsys.readouterr().out
    assert "FAILED" in output
    assert output.splitlines()[-1].startswith("0 of 1 combinations passed")


@pytest.mark.parametrize(
    "change", [lambda gradient: None, lambda gradient: gradient * float("nan")], ids=["none", "nan"]
)
def test_missing_or_nan_gradient_is_caught(change, monkeypatch, tmp_path):
    monkeypatch.setattr(_op, "fused_batch_norm", with_gradient_of("scale", change))
    report = tmp_path / "report.json"
    arguments = ["--dtype", "float32", "--layout", "NC", "--mode", "training", "--activation", "none"]
    assert gradcheck.main([*arguments, "--json", str(report)]) == 1
    content = json.loads(report.read_text())
    assert not content["passed"]
    assert [result["errors"]["scale"] for result in content["results"]] == [None, None]


def test_gradient_of_the_statistics_outputs_is_checked():
    def without(x, *inputs, **options):
        y, mean, variance = tfops.fused_batch_norm(x, *inputs, **options)
        return y, tf.stop_gradient(mean), tf.stop_gradient(variance)

    case = gradcheck.Case("NHWC", "moving")
    for result in gradcheck.check_op(case, function=without):
        assert not result.passed, result
        assert result.errors["x"] > 10 * result.tolerances["x"]
