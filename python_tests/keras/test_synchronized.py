"""synchronized=True: two replicas with parts of a batch do what one device does with the whole of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tfops_testing.fresh_process import run_python


def _case(parts=(6, 6), shape=(4, 5, 3), **kwargs):
    defaults = {"mask": False, "residual": False, "mean": 1.0, "dtype": "float32", "layer": {}}
    switches = {"graph": True, "second": False, "recomputed": False, "bad": False}
    return {"parts": parts, "shape": shape, **defaults, **switches, **kwargs}


CASES = {
    "halves": _case(),
    "unequal": _case((9, 3), layer={"activation": "relu"}, residual=True),
    "empty": _case((8, 0), second=True, dtype="float64"),
    "large mean": _case((7, 5), mean=1000.0),
    "channels first": _case((5, 7), (3, 4, 5), layer={"axis": 1, "activation": "silu"}),
    "mask": _case((9, 3), mask=True, second=True, dtype="float64"),
    "renorm": _case(
        (5, 7), layer={"renorm": True, "renorm_momentum": 0.5, "renorm_clipping": {"rmax": 1.5}}, mask=True
    ),
    "eager": _case((9, 3), graph=False),
    "bare": _case((5, 7), layer={"scale": False, "center": False}),
    "recomputed": _case((9, 3), layer={"activation": "silu"}, residual=True, recomputed=True),
    "recomputed mask, eager": _case((9, 3), mask=True, dtype="float64", recomputed=True, graph=False),
}
# Of two replicas, the second has a NaN.
BAD = {
    "bad": _case((5, 7), bad=True, layer={"skip_nonfinite": True}),
    "bad, mask": _case((5, 7), bad=True, mask=True, graph=False, layer={"skip_nonfinite": True}),
    "bad, apart": _case((5, 7), bad=True, layer={"skip_nonfinite": True, "synchronized": False}),
}


@pytest.fixture(scope="module")
def results():
    import keras

    cases = CASES | BAD
    if "renorm" not in keras.layers.BatchNormalization().get_config():
        del cases["renorm"]
    run = run_python("-m", "tfops_testing.synchronized_check", json.dumps(list(cases.values())))
    assert run.returncode == 0, run.stderr[-5000:]
    return dict(zip(cases, json.loads(run.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_replicas_agree_with_one_device(results, name):
    """Outputs, gradients, second derivatives and moving averages; the latter are the same on both replicas."""
    if name not in results:
        pytest.skip("this Keras has no renorm")
    replicas, (single,), _ = results[name]
    tolerance = 1e-5 if name != "large mean" else 1e-4
    for replica in replicas:
        assert len(replica) == len(single)
        for i, (got, want) in enumerate(zip(replica, single, strict=True)):
            bound = tolerance * (1 + np.abs(want).max())
            np.testing.assert_allclose(got, want, rtol=0, atol=bound, err_msg=str(i))
    assert replicas[0][-2:] == replicas[1][-2:]


def test_one_collective_each_way(results):
    """On each replica: count, mean and variance forward, two sums backward."""
    *_, collectives = results["eager"]
    assert collectives == [["all_gather", 9], ["all_gather", 9], ["all_reduce", 6], ["all_reduce", 6]]


@pytest.mark.parametrize("name", ["bad", "bad, mask"])
def test_replicas_skip_together(results, name):
    replicas, *_ = results[name]
    for replica in replicas:
        assert replica[-2:] == [[0, 0, 0], [1, 1, 1]]


def test_replicas_with_statistics_of_their_own_skip_alone(results):
    (first, second), *_ = results["bad, apart"]
    assert 0 not in first[-2]
    assert 1 not in first[-1]
    assert second[-2:] == [[0, 0, 0], [1, 1, 1]]
