"""What lessons 5, 6 and 8 claim: the two sides of each comparison agree, and where they should differ they do."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tfops_testing.models_data import draw_arrays, run_in
from tfops_testing.paths import MODELS

pytest.importorskip("matplotlib", reason="needs matplotlib")
pytestmark = pytest.mark.source_tree

# Runs a lesson as a script, and prints what expressions in its names are, as the last line.
RUN = """
import json, runpy, sys
names = runpy.run_path(sys.argv[1])
print(json.dumps([eval(expression, names) for expression in sys.argv[2:]]))
"""


def evaluate(lesson: str, folder, *expressions: str) -> list:
    np.savez(folder / "mnist.npz", **draw_arrays(1200, 300))
    variables = {"TFOPS_MNIST": str(folder / "mnist.npz"), "LESSON_QUICK": "1", "MPLBACKEND": "agg"}
    done = run_in(folder, "-c", RUN, MODELS / f"{lesson}.py", *expressions, timeout=600, **variables)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_batch_norm_by_hand(tmp_path):
    """Derived gradients are the numerical ones and the op's; one pass in float32 loses the variance, tfops does not."""
    loss = "lambda: (g * forward(x, gamma, beta)[0]).sum()"
    numerical = [
        f"float(relative_error({derived}, numerical_gradient({loss}, {name})))"
        for name, derived in (("x", "dx"), ("gamma", "dgamma"), ("beta", "dbeta"))
    ]
    *numerical, by_op, inference, one_pass, two_passes, fused = evaluate(
        "batch_norm_by_hand",
        tmp_path,
        *numerical,
        "max(float(relative_error(got.numpy(), want)) for got, want in zip(by_op, by_hand, strict=True))",
        "float(relative_error(op.numpy(), inference))",
        *(f"float(list(errors.values())[{i}][-1])" for i in range(3)),
    )
    assert max(numerical) < 1e-6
    assert max(by_op, inference) < 1e-12
    assert max(two_passes, fused) < 1e-4
    assert one_pass > 0.1


@pytest.mark.slow
def test_convert_resnet50(tmp_path):
    """The same outputs, after a training step, saving and the way back."""
    counts, differences = evaluate(
        "convert_resnet50",
        tmp_path,
        "[sum(isinstance(layer, tfops.keras.BatchNormalization) for layer in each.layers) for each in (fused, stock)]",
        "[float(tf.reduce_max(tf.abs(each(images, training=False) - expected)) / tf.reduce_max(tf.abs(expected)))"
        " for each in (loaded, stock, model)]",
    )
    assert counts == [53, 0]
    assert max(differences) < 1e-4


def test_devices(tmp_path):
    """Synchronized replicas compute what one device does, others do not; the graph is cut in two, and learns."""
    printed = "{line.get_label(): max(map(float, line.get_xdata())) for line in axes.lines}"
    parts = "sorted(len(part.node) for part in metadata.partition_graphs)"
    differences, nodes, loss = evaluate("devices", tmp_path, printed, parts, "float(loss_value)")
    assert differences["synchronized=True"] < 1e-4
    assert differences["synchronized=False"] > 1e-2
    assert len(nodes) == 2
    assert nodes[0] > 20
    assert loss < 2.3
