"""The CUDA kernels of the installed library, as NVIDIA's cuobjdump sees them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import tfops_kernels

STREAMING = ("MomentsKernel", "NormalizeKernel", "GradientMomentsKernel", "GradientNormalizeKernel")
ON_CHIP = ("OnChipForwardKernel", "OnChipBackwardKernel")


def tool(name: str) -> str:
    """A program of NVIDIA's, from its package or from a CUDA toolkit. Skips the test if there is none."""
    packaged = [Path(p) / "nvidia/cu13/bin" / name for p in sys.path]
    found = next((str(p) for p in packaged if p.exists()), None) or shutil.which(name)
    if not found:
        pytest.skip(f"needs {name}: pip install nvidia-cuda-{name}")
    return found


def cuobjdump(*arguments: str, **environment: str) -> str:
    """The output of cuobjdump for the library."""
    library = Path(tfops_kernels.__file__).with_name("libtfops_kernels.so")
    command = [tool("cuobjdump"), *arguments, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment}).stdout


def kernels() -> dict[tuple[str, str], dict[str, int]]:
    """For each architecture and kernel, the compiler's report: REG, STACK, SHARED, LOCAL and so on."""
    found = {}
    architecture = name = ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+\w?)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[architecture, name] = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)}
    return found


class Instruction(NamedTuple):
    """One of machine code: `@!P0 BRA 0x1230` has predicate "@!P0", opcode "BRA", operands "0x1230"."""

    address: int
    predicate: str
    opcode: str
    operands: str

    def matches(self, pattern: str) -> bool:
        return re.match(pattern, self.opcode) is not None


def architectures() -> list[str]:
    """Those that the library has machine code for: "90" and so on."""
    names = tfops_kernels.build_info()["cuda_architectures"].split()
    return [name.removesuffix("-real") for name in names if not name.endswith("-virtual")]


@functools.cache
def machine_code(architecture: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel."""
    folder = str(Path(tool("nvdisasm")).parent)
    listing = cuobjdump("-sass", "-arch", f"sm_{architecture}", PATH=folder + os.pathsep + os.environ["PATH"])
    code = {}
    for function in re.split(r"\n\s*Function : ", listing)[1:]:
        name, _, body = function.partition("\n")
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+) )?([A-Z][\w.]*)\s*([^;]*);", body)
        code[name] = [Instruction(int(address, 16), *rest, last.strip()) for address, *rest, last in found]
    return code


# Threads of a warp that went different ways are together again after these.
MEETINGS = r"BSYNC|WARPSYNC|BAR\.SYNC|UCGABAR_WAIT"
# What all threads of a block have alike, if their operands are alike: arithmetic, and loads of constants.
_UNIFORM_LOADS = r"U?LDC|LDCU|S2UR|R2UR|CS2R"
_VARYING = r"S2R|LD|SHFL|ATOM|VOTE|MATCH|CALL|POPC"


def divergent_branches_before(code: list[Instruction], at: int) -> Iterator[Instruction]:
    """The branches that threads of a warp may take differently, and then come to instruction `at` without a meeting.

    A branch counts unless what it depends on is seen to follow from constants and uniform registers alone.
    """
    places = {instruction.address: i for i, instruction in enumerate(code)}
    before: dict[int, list[int]] = {i: [] for i in range(len(code))}
    for i, instruction in enumerate(code):
        conditional = bool(instruction.predicate) or re.match(r"!?U?P\w+,", instruction.operands) is not None
        if instruction.opcode.startswith("BRA") and (target := re.search(r"0x[0-9a-f]+", instruction.operands)):
            before[places[int(target[0], 16)]].append(i)
        if i + 1 < len(code) and (conditional or not instruction.matches("BRA|EXIT|RET")):
            before[i + 1].append(i)
    seen, todo = set(), [at]
    while todo:
        for i in before[todo.pop()]:
            instruction = code[i]
            if i in seen or (instruction.matches(MEETINGS) and not instruction.predicate):
                continue
            seen.add(i)
            todo.append(i)
            condition = instruction.predicate.lstrip("@!") or instruction.operands.split(",")[0].lstrip("!")
            by_thread = re.fullmatch(r"P\d", condition) and not _is_uniform(code, condition, i)
            if instruction.opcode.startswith("BRA") and by_thread:
                yield instruction


def _is_uniform(code: list[Instruction], register: str, end: int, depth: int = 8) -> bool:
    """Whether all threads have the same in a register, or predicate, before instruction `end`."""
    if register.startswith("U") or register in ("RZ", "PT"):
        return True
    for i in range(end - 1, -1, -1) if depth else ():
        instruction = code[i]
        results = re.match(r"(\w+)(?:\.reuse)?(?:, (P\w))?", instruction.operands)
        written = {results[1], results[2]} if results and not instruction.matches("ST|BRA|BAR") else set()
        if re.search(r"\.64|\.WIDE", instruction.opcode) and (
            pair := re.fullmatch(r"R(\d+)", results[1] if results else "")
        ):
            written.add(f"R{int(pair[1]) + 1}")
        if register not in written:
            continue
        if instruction.predicate or (instruction.matches(_VARYING) and not instruction.matches(_UNIFORM_LOADS)):
            return False
        sources = set(re.findall(r"\bU?[RP]\d+\b", instruction.operands.split(",", 1)[-1])) - {register}
        if "SETP" in instruction.opcode and register in instruction.operands.split(",", 1)[-1]:
            sources.add(register)  # P0 from P0
        return all(_is_uniform(code, source, i, depth - 1) for source in sources)
    return False
