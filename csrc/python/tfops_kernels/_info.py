"""What this build holds, what is on this machine, and what has run."""

from __future__ import annotations

from typing import Any

from tfops_kernels import _build, _kernels


def cuda_launches() -> dict[str, Any]:
    """Which CUDA kernels have run since the process began, and which CUDA would not start.

    Returns:
        A dict with the items

            - `calls` (dict): how many calls each tier ("one_block", "cluster", "grid", "streaming") has done, those of
              the TensorFlow ops too. Inference counts as "streaming";
            - `refusals` (list of dicts): launches that CUDA refused, for which the streaming tier did the work: the
              `tier`, the `pass` ("forward" or "backward"), CUDA's `error`, the first `problem` of this kind, and the
              `count` of such problems. A refused problem streams from then on.

    Examples:
        >>> import tfops_kernels
        >>> launches = tfops_kernels.cuda_launches()
        >>> launches["refusals"]
        []
    """
    return _kernels.cuda_launches()


def build_info() -> dict[str, Any]:
    """What this build holds, and what is on this machine.

    Returns:
        A dict that can be written as JSON, with the items

            - `version` (str);
            - `tensorflow` (str): the versions that ops were built for, one of each release; "" if none were built;
            - `compiler` (str) and `build_type` (str);
            - `native` (bool): whether it was built for one machine alone (TFOPS_NATIVE=ON);
            - `cpu_instruction_sets` (str): those that there are kernels for, separated by spaces;
            - `cpu_instruction_set` (str): the one that is used; "none" if this machine has none of them;
            - `cuda` (bool), `cuda_toolkit` (str) and `cuda_architectures` (str): whether there are CUDA kernels, what
              compiled them, and for which GPUs;
            - `cuda_driver_needed` (str): the CUDA version that a driver has to serve at least for these kernels; ""
              if there are none;
            - `cuda_driver` (str): the newest CUDA version that the driver serves; "" if there is no driver;
            - `gpus` (list of dicts): the `name`, `compute_capability`, `multiprocessors` and `memory_bytes` of each,
              and why kernels cannot run on it, `problem`, which is "" if they can;
            - `cuda_problem` (str): why no GPU can be used; "" if one can.

    Examples:
        >>> import tfops_kernels
        >>> info = tfops_kernels.build_info()
        >>> info["cpu_instruction_set"] in info["cpu_instruction_sets"].split()
        True
    """
    return {
        "version": _build.VERSION,
        "tensorflow": _build.TENSORFLOW,
        "compiler": _build.COMPILER,
        "build_type": _build.BUILD_TYPE,
        "native": _build.NATIVE,
        "cpu_instruction_sets": _build.CPU_INSTRUCTION_SETS,
        "cpu_instruction_set": _kernels.instruction_set(),
        **_kernels.cuda_build(),
        **_kernels.driver(),
    }
