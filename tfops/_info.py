"""What was built with what, and what is here."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import tfops_kernels
from tfops import _gpus, _xla


def build_info() -> dict[str, Any]:
    """What this build of tfops holds, and what is on this machine.

    Returns:
        The dict of `tfops_kernels.build_info()`, and four more items. `tensorflow_running` (str) is the version of
            TensorFlow in this process. `xla` (bool) tells whether XLA can compile the ops (`jit_compile=True`), and
            `xla_problem` (str) why not; it is "" if XLA can. `fallback` (str) says why the CUDA kernels cannot serve a
            GPU that TensorFlow may use, so that batch normalization runs on TensorFlow's own operations; it is "" if
            they can, or if there is no GPU.

    Examples:
        >>> import tfops
        >>> import tfops_kernels
        >>> info = tfops.build_info()
        >>> info["version"] == tfops.__version__
        True
        >>> sorted(set(info) - set(tfops_kernels.build_info()))
        ['fallback', 'tensorflow_running', 'xla', 'xla_problem']
    """
    return {
        **tfops_kernels.build_info(),
        "tensorflow_running": tf.__version__,
        "xla": not _xla.PROBLEM,
        "xla_problem": _xla.PROBLEM,
        "fallback": _gpus.problem(),
    }
