"""The handlers of XLA's custom calls, called by hand: the CUDA ones, on GPUs that csrc/simt plays, and their traits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tfops_kernels._api import xla_attributes
from tfops_testing import kernel_cases
from tfops_testing import simt as simt_helper
from tfops_testing.kernel_cases import Case
from tfops_testing.xla_handlers import COMMAND_BUFFER_COMPATIBLE, INITIALIZE, HandlerError, Handlers

pytestmark = pytest.mark.skipif(not simt_helper.xla_headers(), reason="needs XLA's headers, of JAX or TensorFlow 2.20")
OPS = ("Training", "TrainingGrad", "Inference", "InferenceGrad", "Moments", "GradientMoments", "GradientNormalize")


@pytest.fixture(scope="module")
def handlers(simt) -> Handlers:
    return Handlers(simt.machine.__file__)


@pytest.fixture
def asked(handlers) -> list[str]:
    handlers.asked.clear()
    return handlers.asked


class _Calls:
    """forward() and backward() of tfops_kernels through the handlers, each call initialized as XLA does it."""

    def __init__(self, simt, handlers: Handlers):
        self.simt, self.handlers = simt, handlers

    def _run(self, name: str, problem, arguments, results, spare: int = 0, direction: str = "forward") -> list:
        self.loads = [self.simt.loads()]
        size = getattr(self.simt, f"cuda_{direction}_workspace_bytes")(problem)
        workspace = simt_helper.memory((max(size - spare, 0),), "uint8")
        for symbol, stage in (
            (f"Tfops_BatchNorm{name}_cuda_initialize", INITIALIZE),
            (f"Tfops_BatchNorm{name}_cuda", 3),
        ):
            before = [result.copy() for result in results]
            attributes = xla_attributes(problem)
            self.handlers.call(symbol, arguments, [*results, workspace], attributes, stage)
            self.loads.append(self.simt.loads())
            if stage == INITIALIZE:  # which only looks
                for result, was in zip(results, before, strict=True):
                    np.testing.assert_array_equal(result.view(np.uint8), was.view(np.uint8))
        return results

    def problem(self, x, residual, **settings):
        dtype = getattr(self.simt.DataType, x.dtype.name)
        activation = settings.pop("activation") or ""
        return self.simt.Problem(
            shape=list(x.shape), dtype=dtype, has_residual=residual, activation=activation, **settings
        )

    def forward(self, x, scale, offset, *running, residual=None, spare=0, **settings):
        problem = self.problem(x, residual is not None, **settings)
        vectors = [simt_helper.memory(scale.shape, scale.dtype) for _ in range(4)] if problem.training else []
        mask = [simt_helper.memory((problem.activation_bits_bytes,), "uint8")] if problem.training else []
        results = [simt_helper.memory(x.shape, x.dtype), *vectors, *mask]
        arguments = [x, scale, offset, *running, *([] if residual is None else [residual])]
        name = "Training" if problem.training else "Inference"
        results = self._run(name, problem, arguments, results, spare)
        if mask and not mask[0].size:
            results[-1] = None
        return self.simt._api.Forward._make([*results, *[None] * (6 - len(results))])

    def backward(
        self, dy, x, scale, offset, mean, spread, *, dmean=None, dvariance=None, residual=None, mask=None, **s
    ):
        problem = self.problem(x, residual is not None, **s)
        vector = lambda: simt_helper.memory(scale.shape, scale.dtype)  # noqa: E731
        separate = residual is not None and s["activation"] is not None
        dresidual = simt_helper.memory(x.shape if separate else (0,), x.dtype)
        vectors = [vector() for _ in range(2 if problem.training else 4)]
        arguments = [dy, x, scale, offset, mean, spread]
        if problem.training:
            arguments.append(np.empty(0, np.uint8) if mask is None else mask)
            arguments += [] if dmean is None else [dmean, dvariance]
        arguments += [residual] if problem.needs_residual else []
        results = [simt_helper.memory(x.shape, x.dtype), *vectors, dresidual]
        name = "TrainingGrad" if problem.training else "InferenceGrad"
        self._run(name, problem, arguments, results, direction="backward")
        vectors += [None] * (4 - len(vectors))
        return self.simt._api.Backward(results[0], *vectors, dresidual if separate else dy)


@pytest.mark.parametrize("device", ["h200", "three", "small_old"])
@pytest.mark.parametrize(("shape", "axis"), [((50, 3, 23), -1), ((64, 32), -1), ((3, 37, 5, 5), 1)], ids=str)
def test_cuda_handlers_agree_with_numpy(simt, handlers, asked, shape, axis, device):
    simt.configure(device)
    for case in kernel_cases.combinations(shape, axis):
        kernel_cases.check(case, simt.place, np.asarray, kernels=_Calls(simt, handlers))
    assert set(asked) == {"Stream_Get"}  # no memory, above all: its address would not be that of the next call


def test_cuda_handlers_may_be_captured(handlers, asked):
    for op in OPS:
        for suffix in ("cuda", "cuda_initialize"):
            assert handlers.traits(f"Tfops_BatchNorm{op}_{suffix}") == COMMAND_BUFFER_COMPATIBLE
        assert handlers.traits(f"Tfops_BatchNorm{op}_cpu") == 0
    assert not asked


@pytest.mark.parametrize("tier", ["one_block", "cluster", "grid", "streaming"])
def test_initializing_loads_and_launches_nothing(simt, handlers, tier):
    """So nothing is left to load for a call that may be captured."""
    case = Case((513, 24), -1, "float32", True, "relu", True)
    calls = _Calls(simt, handlers)

    def run():
        simt.configure("h200")
        with simt.settings(tier=tier):
            kernel_cases.check(case, simt.place, np.asarray, kernels=calls)

    with simt.counted() as launches, ThreadPoolExecutor(1) as pool:  # a thread that has loaded nothing
        pool.submit(run).result()
    assert len(launches) == (6 if tier == "streaming" else 2)
    before, initialized, executed = calls.loads  # of the backward pass
    assert before < initialized == executed


def test_workspace_that_is_too_small_is_refused(simt, handlers):
    simt.configure("three")
    x = simt.place(np.ones((600, 64), np.float32))
    vector = simt.place(np.ones(64, np.float32))
    settings = {"axis": -1, "epsilon": 1e-3, "training": True, "activation": None}
    settings |= {"exponential_avg_factor": 1.0, "unbiased": True}
    calls = _Calls(simt, handlers)
    calls.forward(x, vector, vector, **settings)
    with pytest.raises(
        HandlerError, match=r"compiled with \d+ bytes of workspace for tfops, but this machine needs \d+"
    ):
        calls.forward(x, vector, vector, spare=1, **settings)


def test_a_compiler_asks_for_the_largest_workspace_of_any_gpu(simt):
    problem = kernel_cases.make_problem(simt, Case((4096, 64), -1, "float32"))
    for direction in ("forward", "backward"):
        ask = getattr(simt, f"cuda_{direction}_workspace_bytes")
        sizes = []
        for device in simt.devices():
            simt.configure(device)
            sizes.append(ask(problem))
            assert ask(problem, any_gpu=True) >= max(sizes)
        assert ask(problem, any_gpu=True) == max(sizes) > min(sizes)


def test_wrong_operands_are_refused(simt, handlers):
    simt.configure("three")
    x = simt.place(np.ones((6, 4), np.float32))
    problem = kernel_cases.make_problem(simt, Case((6, 4), -1, "float32"))
    with pytest.raises(HandlerError, match="tfops custom call with 2 operands and 1 results, not 3 and 7"):
        handlers.call("Tfops_BatchNormTraining_cuda", [x, x], [x], xla_attributes(problem))
