"""The extension module, csrc/python/module.cc. Arrays are addresses: integers, 0 for none."""

from collections.abc import Sequence
from typing import Any, ClassVar

class DataType:
    __members__: ClassVar[dict[str, DataType]]
    float16: ClassVar[DataType]
    bfloat16: ClassVar[DataType]
    float32: ClassVar[DataType]
    float64: ClassVar[DataType]
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __int__(self) -> int: ...

class Problem:
    def __init__(
        self,
        *,
        shape: Sequence[int],
        axis: int,
        dtype: DataType,
        activation: str,
        has_residual: bool,
        training: bool,
        epsilon: float,
        exponential_avg_factor: float,
        unbiased: bool,
    ) -> None: ...
    @property
    def dtype(self) -> DataType: ...
    @property
    def channels(self) -> int: ...
    @property
    def elements(self) -> int: ...
    @property
    def mask_bytes(self) -> int: ...
    @property
    def needs_mask(self) -> bool: ...
    @property
    def needs_residual(self) -> bool: ...

class ForwardArrays:
    x: int
    scale: int
    offset: int
    residual: int
    mean: int
    variance: int
    y: int
    mean_out: int
    variance_out: int
    saved_mean: int
    saved_inv_std: int
    mask: int
    def __init__(self) -> None: ...

class BackwardArrays:
    dy: int
    x: int
    scale: int
    offset: int
    mean: int
    spread: int
    dmean: int
    dvariance: int
    residual: int
    mask: int
    dx: int
    dscale: int
    doffset: int
    dmean_in: int
    dvariance_in: int
    dresidual: int
    def __init__(self) -> None: ...

class Kept:
    flags: int
    length: int
    def __init__(self) -> None: ...

class MomentsArrays:
    x: int
    kept: Kept
    count: int
    mean: int
    variance: int
    def __init__(self) -> None: ...

class StatisticsGradient:
    tilt: int
    shift: int
    kept: Kept
    def __init__(self) -> None: ...

class CudaDevice:
    compute_capability: int
    multiprocessors: int
    shared_bytes_per_block: int
    shared_bytes_per_multiprocessor: int
    l2_bytes: int
    largest_cluster: int
    cooperative: bool
    def __init__(self) -> None: ...

class CudaPlan:
    @property
    def tier(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def launches(self) -> int: ...
    @property
    def lanes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def blocks_per_slab(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...

def cuda_plan(problem: Problem, backward: bool, aligned: bool, device: CudaDevice, /) -> CudaPlan: ...
def cpu_forward(problem: Problem, arrays: ForwardArrays, threads: int, /) -> None: ...
def cpu_backward(problem: Problem, arrays: BackwardArrays, threads: int, /) -> None: ...
def cpu_moments(problem: Problem, arrays: MomentsArrays, threads: int, /) -> None: ...
def cpu_gradient_phase(
    problem: Problem, arrays: BackwardArrays, statistics: StatisticsGradient | None, threads: int, /
) -> None: ...
def cuda_forward(problem: Problem, arrays: ForwardArrays, workspace: int, stream: int, /) -> None: ...
def cuda_backward(problem: Problem, arrays: BackwardArrays, workspace: int, stream: int, /) -> None: ...
def cuda_moments(problem: Problem, arrays: MomentsArrays, workspace: int, stream: int, /) -> None: ...
def cuda_gradient_phase(
    problem: Problem,
    arrays: BackwardArrays,
    statistics: StatisticsGradient | None,
    workspace: int,
    stream: int,
    /,
) -> None: ...
def cuda_forward_workspace_bytes(problem: Problem, /) -> int: ...
def cuda_backward_workspace_bytes(problem: Problem, /) -> int: ...
def cuda_moments_workspace_bytes(problem: Problem, /) -> int: ...
def instruction_set() -> str: ...
def cuda_build() -> dict[str, Any]: ...
def driver() -> dict[str, Any]: ...
