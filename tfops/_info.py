"""What was built with what, and what is here."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import tfops_kernels


def build_info() -> dict[str, Any]:
    """What this build of tfops holds and what is on this machine.

    Returns:
      The dict of `tfops_kernels.build_info`, and `tensorflow_running`: the version of TensorFlow in this process.
    """
    return {**tfops_kernels.build_info(), "tensorflow_running": tf.__version__}
