"""The program `python -m tfops.info`: prints `tfops.build_info()`, for people and for bug reports."""

from __future__ import annotations

import sys

from tfops._info import build_info


def main() -> int:
    """Prints a line for each item: versions, compiler, instruction sets, CUDA, XLA, driver and GPUs.

    Returns:
        The exit status, 0.

    Examples:
        >>> import contextlib, io
        >>> from tfops import info
        >>> with contextlib.redirect_stdout(io.StringIO()) as printed:
        ...     status = info.main()
        >>> status
        0
        >>> printed.getvalue().split()[0]
        'tfops'
    """
    info = build_info()
    rows = [
        ("tfops", f"{info['version']} ({info['compiler']}, {info['build_type']})"),
        ("TensorFlow", f"built for {info['tensorflow']}, running {info['tensorflow_running']}"),
        ("Built for", "this machine alone (TFOPS_NATIVE=ON)" if info["native"] else "all machines"),
        ("CPU kernels", f"{info['cpu_instruction_set']}, of {info['cpu_instruction_sets']}"),
        (
            "CUDA kernels",
            f"toolkit {info['cuda_toolkit']}, architectures {info['cuda_architectures']}"
            if info["cuda"]
            else "none in this build",
        ),
        ("XLA kernels", ("CPU and CUDA" if info["cuda"] else "CPU") if info["xla"] else f"none: {info['xla_problem']}"),
        (
            "CUDA driver",
            (f"serves CUDA {info['cuda_driver']}" if info["cuda_driver"] else "none")
            + (f"; the kernels need {info['cuda_driver_needed']} or later" if info["cuda"] else ""),
        ),
    ]
    if info["fallback"]:
        rows.append(("Fallback", f"TensorFlow's own operations in place of the kernels: {info['fallback']}"))
    for gpu in info["gpus"]:
        memory = gpu["memory_bytes"] / 2**30
        rows.append(
            (
                "GPU",
                f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
                f"{gpu['multiprocessors']} multiprocessors, {memory:.0f} GiB"
                + (f": {gpu['problem']}" if gpu["problem"] else ""),
            )
        )
    if not info["gpus"]:
        rows.append(("GPU", f"none: {info['cuda_problem'] or 'no device'}"))
    for name, value in rows:
        print(f"{name:<13} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
