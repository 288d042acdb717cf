"""What was built with what, and what is here."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import tfops_kernels
from tfops import _xla


def build_info() -> dict[str, Any]:
    """What this build of tfops holds and what is on this machine.

    Returns:
      The dict of `tfops_kernels.build_info`, and `tensorflow_running`: the version of TensorFlow in this process; `xla`
      (bool): whether XLA can compile the ops (`jit_compile=True`), and `xla_problem`: why not ("" if it can).
    """
    return {
        **tfops_kernels.build_info(),
        "tensorflow_running": tf.__version__,
        "xla": not _xla.PROBLEM,
        "xla_problem": _xla.PROBLEM,
    }
