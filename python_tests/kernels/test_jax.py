"""The kernels in JAX, by the handlers of XLA's custom calls, agree with float64 NumPy, in programs of all kinds."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

import tfops_kernels
from tfops_testing import in_place_cases, kernel_cases, virtual_batches
from tfops_testing.fresh_process import run_python

jax = pytest.importorskip("jax", reason="needs JAX")
tfops_jax = pytest.importorskip("tfops_kernels.jax", exc_type=ImportError)  # which says why there are no handlers

PLATFORMS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=PLATFORMS)
def device(request):
    try:
        found = jax.devices(request.param)[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no {request.param}: {error}")
    with jax.default_device(found):
        yield found


DEFAULTS = {"axis": -1, "epsilon": 1e-3, "exponential_avg_factor": 1.0, "training": True, "unbiased": True}


class _Kernels:
    """forward() and backward() of tfops_kernels, by compiled functions of JAX."""

    @staticmethod
    def forward(*arrays, residual=None, **settings):
        arrays = [*arrays, *[None] * (5 - len(arrays)), residual]
        settings = DEFAULTS | settings
        forward = jax.jit(functools.partial(tfops_jax._forward, tfops_jax._Settings(**settings)))
        out, ((_, _, _, *saved, _), _, _) = forward(*arrays)
        if not settings["training"]:
            return tfops_kernels.Forward(out.y, None, None, None, None, None)
        *saved, mask = saved
        return tfops_kernels.Forward(*out, *saved, mask if mask.size else None)

    @staticmethod
    def backward(
        dy, x, scale, offset, mean, spread, *, dmean=None, dvariance=None, residual=None, mask=None, **settings
    ):
        zero = np.zeros_like(scale)
        upstream = tfops_jax.BatchNorm(dy, zero if dmean is None else dmean, zero if dvariance is None else dvariance)
        settings = DEFAULTS | settings
        if settings.get("in_place"):  # x is the y that was kept, and so this is no gradient of a function of x

            @jax.jit
            def gradient_of_kept(*kept):
                no_mask = np.zeros(0, np.uint8)
                return tfops_jax._backward(
                    tfops_jax._Settings(**settings), ((*kept, no_mask, None), False, False), upstream
                )

            dx, dscale, doffset, *_ = gradient_of_kept(x, scale, offset, mean, spread)
            return tfops_kernels.Backward(dx, dscale, doffset, None, None, None)
        running = [mean, spread]
        if settings["training"]:  # the running statistics, which do not matter to the gradient
            running = [] if dmean is None else [np.zeros_like(scale)] * 2
        inputs = [x, scale, offset, *running] + [residual] * (residual is not None)

        def run(*inputs):
            others = {} if residual is None else {"residual": inputs[-1]}
            return tfops_jax.batch_norm(*inputs[: 3 + len(running)], **others, **settings)

        @jax.jit
        def gradient(inputs, upstream):
            return jax.vjp(run, *inputs)[1](upstream)

        dx, dscale, doffset, *others = gradient(inputs, upstream)
        dmean_in, dvariance_in = others[:2] if running else (None, None)
        return tfops_kernels.Backward(
            dx, dscale, doffset, dmean_in, dvariance_in, None if residual is None else others[-1]
        )


@pytest.mark.parametrize("case", kernel_cases.random_cases(seed=5, count=2), ids=str)
def test_shapes(device, case):
    kernel_cases.check(case, jax.numpy.asarray, np.array, kernels=_Kernels)


@pytest.mark.parametrize(("case", "size"), virtual_batches.cases(seed=4)[::3], ids=str)
def test_virtual_batches(device, case, size):
    virtual_batches.check(case, size, jax.numpy.asarray, np.asarray, kernels=_Kernels)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((50, 3, 23), -1), ((3, 37, 5, 5), 1)], ids=str)
def test_combinations(device, shape, axis, dtype):
    for case in kernel_cases.combinations(shape, axis):
        if case.dtype == dtype:
            kernel_cases.check(case, jax.numpy.asarray, np.array, kernels=_Kernels)


def _layers(x, vectors):
    """Two batch norms in a row, with a shortcut: some steps of what a network does."""
    scale, offset = vectors
    y = tfops_jax.batch_norm(x, scale, offset, activation="relu").y
    return tfops_jax.batch_norm(y * 0.5, scale, offset, activation="relu6", residual=x).y


def _inputs():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 7, 7, 24)).astype(np.float32)
    return jax.numpy.asarray(x), tuple(jax.numpy.asarray(rng.uniform(0.5, 2, 24).astype(np.float32)) for _ in range(2))


def test_loops_have_the_bits_of_the_same_calls_in_a_row(device):
    x, vectors = _inputs()
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: _layers(x, vectors), x))(x)
    want = x
    for _ in range(5):
        want = _layers(want, vectors)
    np.testing.assert_array_equal(looped, want)
    assert np.asarray(want).any()


def test_gradients_through_a_scan_are_those_of_the_same_calls_in_a_row(device):
    x, vectors = _inputs()

    def scanned(x, vectors):
        return (jax.lax.scan(lambda x, _: (_layers(x, vectors), None), x, None, length=3)[0] ** 2).sum()

    def unrolled(x, vectors):
        for _ in range(3):
            x = _layers(x, vectors)
        return (x**2).sum()

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, vectors) for f in (scanned, unrolled))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("activation", in_place_cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
def test_in_place(device, dtype, activation):
    case = kernel_cases.Case((3, 5, 7, 24), -1, dtype, activation=activation)
    in_place_cases.check(case, jax.numpy.asarray, np.asarray, kernels=_Kernels)


@pytest.mark.parametrize("activation", in_place_cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
def test_in_place_keeps_y_and_not_x(device, dtype, activation):
    arrays = kernel_cases.inputs(kernel_cases.Case((3, 5, 7, 24), -1, dtype))
    inputs = [jax.numpy.asarray(arrays[name]) for name in ("x", "scale", "offset")]
    norm = functools.partial(tfops_jax.batch_norm, activation=activation, in_place=True)
    y, vjp = jax.vjp(lambda *inputs: norm(*inputs).y, *inputs)
    (kept,) = [each for each in jax.tree.leaves(vjp) if getattr(each, "shape", None) == y.shape]
    np.testing.assert_array_equal(np.asarray(kept).view(np.uint8), np.asarray(y).view(np.uint8))


def test_in_place_refuses_other_activations(device):
    x, vectors = _inputs()
    with pytest.raises(ValueError, match="activation must be one of '', 'leaky_relu', 'elu' where in_place is True"):
        tfops_jax.batch_norm(x, *vectors, activation="relu", in_place=True)


def test_in_place_tells_of_a_scale_near_zero(device):
    """By an error on the CPU, and by NaN in the gradients of these channels on a GPU."""
    if device.platform == "cpu":
        x, (scale, offset) = _inputs()
        with pytest.raises(Exception, match="scale is too near 0 for in_place"):
            tfops_jax.batch_norm(x, scale * 0, offset, in_place=True).y.block_until_ready()
    case = kernel_cases.Case((40, 24), -1, "float32", activation="leaky_relu")
    in_place_cases.check_refusal(case, jax.numpy.asarray, _Kernels, np.asarray)


def test_vmap_is_a_loop(device):
    x, (scale, offset) = _inputs()
    norm = functools.partial(tfops_jax.batch_norm, scale=scale, offset=offset, axis=0, activation="silu")
    x = jax.numpy.moveaxis(x, -1, 0)[:, :4].swapaxes(0, 1)  # four times [channels, 7, 7]
    got = jax.vmap(lambda x: norm(x).y)(x)
    np.testing.assert_array_equal(got, np.stack([norm(each).y for each in x]))


def test_the_workspace_is_a_result_of_the_call():
    x, vectors = _inputs()
    with jax.default_device(jax.devices("cpu")[0]):
        text = jax.jit(lambda x: tfops_jax.batch_norm(x, *vectors).y).lower(x).compile().as_text()
    [call] = [line for line in text.splitlines() if 'custom_call_target="Tfops>BatchNormTraining"' in line]
    results = call.split(" = ")[1].split(" custom-call(")[0]
    problem = tfops_jax._Settings(-1, 1e-3, 1.0, True, None, True).problem(x, False)
    size = tfops_kernels._kernels.cpu_forward_workspace_bytes(problem)
    assert results.endswith(f"u8[{size}]{{0}})")
    assert size > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scale": (4,)}, ValueError, r"scale must have shape \(3,\), but it has \(4,\)"),
        ({"offset": (3, 1)}, ValueError, r"offset must have shape \(3,\), but it has \(3, 1\)"),
        ({"residual": (4, 1)}, ValueError, r"residual must have shape \(5, 3\), but it has \(4, 1\)"),
        ({"x": (3,)}, ValueError, "rank"),
        ({"axis": 2}, ValueError, "axis must be in .* but it is 2"),
        ({"mean": (3,)}, ValueError, r"variance must be an array of shape \(3,\), but it is None"),
        ({"training": False}, ValueError, r"mean must be an array of shape \(3,\), but it is None"),
        ({"exponential_avg_factor": 0.5}, ValueError, "mean must be an array"),
        ({"dtype": "int32"}, TypeError, "x must be of dtype float16, bfloat16, float32, float64, but it is int32"),
        ({"dtype": "float64"}, TypeError, "scale must be of dtype float64, but it is float32"),
    ],
    ids=str,
)
def test_errors_name_the_argument(changes, error, message):
    values = {"x": (5, 3), "scale": (3,), "offset": (3,)} | changes
    dtype = values.pop("dtype", "float32")
    arguments = {
        name: np.ones(value, dtype if name == "x" else "float32") if isinstance(value, tuple) else value
        for name, value in values.items()
    }
    with pytest.raises(error, match=message):
        tfops_jax.batch_norm(**arguments)


def test_missing_library_says_what_to_do(monkeypatch):
    monkeypatch.setattr(tfops_jax, "_LIBRARY", Path("nowhere.so"))
    with pytest.raises(ImportError, match=r"needs nowhere\.so, which this build does not have: build tfops beside"):
        tfops_jax._register()


def test_handlers_newer_than_xla_are_refused_before_it_sees_them():
    """For it would fail to start."""
    running = tfops_jax._ffi_version()
    assert running >= (0, 1)
    for built in (running, (running[0], running[1] - 1)):
        tfops_jax._check_version(built, running)
    newer = (running[0], running[1] + 1)
    message = f"built for version {newer[0]}.{newer[1]} of .* has {running[0]}.{running[1]}: install a newer jaxlib"
    with pytest.raises(ImportError, match=message):
        tfops_jax._check_version(newer, running)
    with pytest.raises(ImportError, match="install a newer jaxlib"):
        tfops_jax._check_version((running[0] + 1, 0), running)
    tfops_jax._check_version(newer, None)  # where there are no headers, XLA says what it thinks of them


def _custom_calls(thunks: str) -> tuple[int, int]:
    """How many custom calls are in command buffers and how many are not, in XLA's dump of a program's thunks.

    A line is `<indent><number>: <kind> ...`. What a command buffer, a loop or a condition holds is indented below it.
    """
    inside = outside = 0
    buffer = None  # the indent of the command buffer that is open
    for line in thunks.splitlines():
        indent = len(line) - len(line.lstrip())
        number, _, rest = line.strip().partition(": ")
        if not number.isdigit():
            continue
        if buffer is not None and indent <= buffer:
            buffer = None
        if rest.startswith("kCommandBuffer") and buffer is None:
            buffer = indent
        if rest.startswith("kCustomCall"):
            inside, outside = inside + (buffer is not None), outside + (buffer is None)
    return inside, outside


def test_custom_calls_are_counted_where_they_are():
    thunks = """\
000: kCommandBuffer
  001: kKernel kernel=loop_add_fusion
  002: kWhile
    body:
      003: kCustomCall
      004: kCustomCall
005: kKernel kernel=input_reduce_fusion
006: kCustomCall
007: kWhile
  body:
    008: kCommandBuffer
      009: kCustomCall
    010: kCustomCall
"""
    assert _custom_calls(thunks) == (3, 2)


@pytest.mark.gpu
def test_xla_makes_command_buffers_of_the_calls(tmp_path):
    """The calls of a jitted loop become part of CUDA graphs, and have the bits that they have outside of them."""
    program = """
import sys
import jax, numpy as np
from tfops_kernels.jax import batch_norm
jax.devices("cuda")
rng = np.random.default_rng(0)
x = jax.numpy.asarray(rng.standard_normal((64, 14, 14, 64)).astype(np.float32))
scale, offset = (jax.numpy.asarray(rng.uniform(0.5, 2, 64).astype(np.float32)) for _ in range(2))
def step(_, x):
    y = batch_norm(x, scale, offset, activation="relu").y
    return batch_norm(y, scale, offset, activation="relu", residual=x).y
loop = jax.jit(lambda x: jax.lax.fori_loop(0, 20, step, x))
gradient = jax.jit(jax.grad(lambda x: (step(0, step(0, x)) ** 2).sum()))
for _ in range(4):  # the first run records
    results = [np.asarray(loop(x)), np.asarray(gradient(x))]
np.savez(sys.argv[1], *results)
"""
    results = []
    for name, kinds in (("graphs", "FUSION,CUSTOM_CALL,WHILE"), ("plain", "")):
        dump = tmp_path / name
        flags = f"--xla_gpu_enable_command_buffer={kinds} --xla_gpu_graph_min_graph_size=1 --xla_dump_to={dump}"
        file = tmp_path / f"{name}.npz"
        run = run_python("-c", program, file, XLA_FLAGS=flags, JAX_PLATFORMS="cuda,cpu")
        assert run.returncode == 0, run.stderr
        results.append(np.load(file))
        hlo = "\n".join(path.read_text(errors="replace") for path in dump.rglob("*after_optimizations.txt"))
        assert "Tfops>BatchNormTraining" in hlo
        programs = {}  # those after XLA's passes last: there are such only where these changed something
        for path in sorted(dump.rglob("*.thunk_sequence*.txt"), key=lambda path: "after_thunk_passes" in path.name):
            programs[path.name.partition(".thunk_sequence")[0]] = path.read_text()
        counts = [_custom_calls(thunks) for thunks in programs.values()]
        assert sum(map(sum, counts)) >= 4, f"XLA tells of no calls: {sorted(path.name for path in dump.rglob('*'))}"
        wrong = [
            thunks
            for thunks, (inside, outside) in zip(programs.values(), counts, strict=True)
            if (outside if kinds else inside)
        ]
        assert not wrong, "\n".join([name, *wrong])
    for key in results[0].files:
        np.testing.assert_array_equal(results[0][key], results[1][key])
