"""The CUDA kernels as compiled, which needs no GPU: every architecture is there, and nothing spills."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest

import tfops_kernels
from tfops_testing.cuda_binary import (
    ON_CHIP,
    STREAMING,
    Instruction,
    architectures,
    cuobjdump,
    divergent_branches_before,
    kernels,
    machine_code,
)
from tfops_testing.requirements import needs_cuda_build

INFO = tfops_kernels.build_info()
pytestmark = needs_cuda_build


@pytest.fixture(scope="module")
def resources():
    return kernels()


def test_every_architecture_has_every_kernel(resources):
    # As CMake writes them: "90-real" is machine code, "90-virtual" PTX, and "90" both.
    architectures = [arch for arch in INFO["cuda_architectures"].split() if not arch.endswith("-virtual")]
    wanted = {f"sm_{arch.removesuffix('-real')}" for arch in architectures}
    by_architecture: dict[str, set[str]] = {}
    for architecture, name in resources:
        by_architecture.setdefault(architecture, set()).add(name)
    assert set(by_architecture) == wanted
    assert len({frozenset(names) for names in by_architecture.values()}) == 1
    # 4 data types, on vectors; streaming takes single elements too
    names = by_architecture[min(wanted)]
    for count, phases in ((8, STREAMING), (4, ON_CHIP)):
        for phase in phases:
            assert sum(f"{len(phase)}{phase}I" in name for name in names) == count, phase


@pytest.mark.skipif(INFO["native"], reason="this build is for one machine alone")
def test_there_is_ptx_for_gpus_to_come():
    virtual = [arch for arch in INFO["cuda_architectures"].split() if not arch.endswith("-real")]
    assert virtual, "no PTX: the wheel would not run on GPUs to come"
    assert f"sm_{virtual[-1].removesuffix('-virtual')}" in cuobjdump("-lptx")


def test_no_kernel_spills_registers(resources):
    """Registers that spill, and arrays that are indexed at run time, live in local memory, on the stack."""
    bad = {key: usage for key, usage in resources.items() if usage["STACK"] or usage["LOCAL"]}
    assert not bad


def test_registers_leave_room_for_the_planned_threads(resources):
    """256 threads a block and 65,536 registers a multiprocessor: two blocks of the streaming tier, one on the chip."""
    for (_, name), usage in resources.items():
        assert usage["REG"] <= (255 if any(kernel in name for kernel in ON_CHIP) else 128), name


def test_on_chip_kernels_leave_shared_memory_to_the_plan(resources):
    """It is all dynamic, but for what CUDA reserves: 1 KB on some architectures."""
    for (_, name), usage in resources.items():
        if any(kernel in name for kernel in ON_CHIP):
            assert usage["SHARED"] <= 1024, name


def _count(code: list[Instruction], pattern: str) -> int:
    return sum(re.fullmatch(pattern, instruction.opcode) is not None for instruction in code)


def _of(architecture: str, phases: Sequence[str], vectors: bool = False) -> Iterator[tuple[str, list[Instruction]]]:
    """The kernels of phases, of every data type; those on vectors alone if so wanted."""
    lanes = "[248]" if vectors else "[1248]"
    for name, code in machine_code(architecture).items():
        if any(re.search(rf"{len(phase)}{phase}I\w*?Li{lanes}E", name) for phase in phases):
            yield name, code


needs_machine_code = pytest.mark.parametrize("architecture", architectures())
needs_clusters = pytest.mark.parametrize("architecture", [arch for arch in architectures() if int(arch) >= 90])


@needs_machine_code
def test_no_kernel_uses_local_memory(architecture):
    assert machine_code(architecture)
    assert not {name for name, code in machine_code(architecture).items() if _count(code, r"(LDL|STL)(\..*)?")}


@needs_machine_code
def test_no_load_goes_past_coherence(architecture):
    """An output may be an input's array, and blocks read what others have written: .nc loads may find old data."""
    constant = r"LDG(\.\w+)*\.(CONSTANT|NC)(\.\w+)*"
    assert not {name for name, code in machine_code(architecture).items() if _count(code, constant)}


@needs_machine_code
@pytest.mark.parametrize("kernel", [*STREAMING, *ON_CHIP])
def test_accesses_are_of_16_bytes(architecture, kernel):
    """As many loads as a thread has in flight, one store for each vector it has in hand."""
    vectors = dict(_of(architecture, [kernel], vectors=True))
    assert len(vectors) == 4
    for name, code in vectors.items():
        assert _count(code, r"LDG\.E(\.\w+)*\.128(\.\w+)*") >= 4, name
        if "MomentsKernel" not in kernel:
            assert _count(code, r"STG\.E(\.\w+)*\.128(\.\w+)*"), name
        if kernel in ON_CHIP:
            # Into shared memory without registers in between, where the architecture has that.
            assert _count(code, r"LDGSTS(\.\w+)*\.128(\.\w+)*" if int(architecture) >= 80 else r"STS\.128"), name
            assert _count(code, r"LDS(\.\w+)*\.128"), name


def _next(code: list[Instruction], at: int, pattern: str, within: int) -> bool:
    """Whether an instruction of that kind is among the next, or, if `within` < 0, among those before."""
    near = code[at + 1 : at + 1 + within] if within > 0 else code[max(at + within, 0) : at]
    return any(instruction.matches(pattern) for instruction in near)


@needs_clusters
def test_barrier_of_the_cluster_releases_and_acquires(architecture):
    """Arrival is behind a fence, waiting before the invalidation of L1: what blocks wrote, others see."""
    for name, code in _of(architecture, ON_CHIP):
        arrivals = [i for i, instruction in enumerate(code) if instruction.opcode == "UCGABAR_ARV"]
        waits = [i for i, instruction in enumerate(code) if instruction.opcode == "UCGABAR_WAIT"]
        assert len(arrivals) == len(waits) == 2, name  # before blocks read one another, and after they have written
        assert all(_next(code, i, r"MEMBAR\.ALL\.GPU", -6) for i in arrivals), name
        assert all(_next(code, i, r"CCTL\.IVALL", 4) for i in waits), name


@needs_clusters
def test_warps_are_together_at_the_barrier_of_the_cluster(architecture):
    """It is an aligned one, which takes the warp as a whole."""
    for name, code in _of(architecture, ON_CHIP):
        for i, instruction in enumerate(code):
            if instruction.opcode == "UCGABAR_ARV":
                assert not list(divergent_branches_before(code, i)), name


@needs_clusters
def test_other_blocks_memory_is_read_through_mapa(architecture):
    """PRMT puts the block's rank into the address (0x654), and a generic load follows, for it is no block's own."""
    for name, code in _of(architecture, ON_CHIP):
        maps = [
            i for i, instruction in enumerate(code) if instruction.matches("PRMT") and "0x654" in instruction.operands
        ]
        assert maps, name
        assert any(_next(code, i, r"LD\.E(\.\w+)*$", 8) for i in maps), name


@pytest.mark.parametrize("architecture", [arch for arch in architectures() if int(arch) < 90])
def test_chips_without_clusters_have_none_of_that(architecture):
    for name, code in _of(architecture, ON_CHIP):
        assert not _count(code, r"UCGABAR.*"), name


@needs_machine_code
def test_barrier_of_the_grid_releases_and_acquires(architecture):
    """A fence before the atomic addition, a strong load that is repeated, and the invalidation of L1 after it."""
    for name, code in _of(architecture, ON_CHIP):
        additions = [i for i, instruction in enumerate(code) if instruction.matches(r"ATOMG?\.E\.ADD\.STRONG\.GPU")]
        polls = [i for i, instruction in enumerate(code) if instruction.matches(r"LDG?\.E\.STRONG\.GPU")]
        assert additions, name
        assert polls, name
        assert all(_next(code, i, r"MEMBAR\.(ALL|SC)\.GPU", -24) for i in additions), name
        assert all(_next(code, i, r"CCTL\.IVALL", 12) for i in polls), name


def test_divergence_is_seen():
    """The finder of branches before a barrier, on code that is known."""

    def code(*lines: str) -> list[Instruction]:
        parsed = [re.fullmatch(r"(?:(@\S+) )?(\S+) ?(.*)", line) for line in lines]
        return [Instruction(16 * i, m[1] or "", m[2], m[3]) for i, m in enumerate(parsed) if m]

    by_thread = code(
        "S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x4, PT", "@P0 BRA 0x40", "STS [R1], R2", "UCGABAR_ARV"
    )
    assert [branch.opcode for branch in divergent_branches_before(by_thread, 4)] == ["BRA"]
    synced = [*by_thread[:4], Instruction(64, "", "WARPSYNC.ALL", ""), Instruction(80, "", "UCGABAR_ARV", "")]
    assert not list(divergent_branches_before(synced, 5))
    by_constant = code("LDC R0, c[0x0][0x140]", *(" ".join(filter(None, i[1:])) for i in by_thread[1:]))
    assert not list(divergent_branches_before(by_constant, 4))
