"""Whether the CUDA kernels can serve the GPUs of this process; if not, TensorFlow's own operations take their place.

That is decided for a process, not for a device: on which device an operation of a graph will run is not known when it
is made. If one of the GPUs that TensorFlow may use cannot be served, no op of tfops is made that might be placed there.
Where a device scope names a CPU, the ops are made all the same. So a wrong guess costs time, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context  # there is no public way to ask for the device scope of eager code

from tfops_kernels import _kernels

_served = False  # all GPUs, for good: whatever has to be fast looks at this first
_warned = False
_ANYWHERE = contextlib.nullcontext()


def problem() -> str:
    """Why the kernels cannot serve one of the GPUs that TensorFlow may use; "" if they can, or there is no GPU."""
    gpus = tf.config.get_visible_devices("GPU")
    return next(filter(None, (_problem_of(int(gpu.name.rpartition(":")[2])) for gpu in gpus)), "")


@functools.cache
def _problem_of(index: int) -> str:
    return _kernels.gpu_problem(index)


def _all_served() -> bool:
    global _served
    if not _served and not problem():
        if not tf.executing_eagerly():
            return True
        _served = True  # once something has run eagerly, TensorFlow does not let its visible devices be changed
    return _served


def need_fallback() -> bool:
    """Whether what is made here and now might run on a GPU that the kernels cannot serve. The first time, it warns.

    Raises:
      tf.errors.UnavailableError: TFOPS_STRICT=1, and it might.
      ValueError: TFOPS_STRICT is wrong.
    """
    global _warned
    if _served or _all_served() or _is_for_cpu():
        return False
    why = problem()
    strict = os.environ.get("TFOPS_STRICT", "")
    if strict not in ("", "0", "1"):
        raise ValueError(f"TFOPS_STRICT must be 0 or 1, but it is {strict!r}")
    if strict == "1":
        raise tf.errors.UnavailableError(None, None, f"{why}, or without TFOPS_STRICT=1")
    if not _warned:
        _warned = True
        warnings.warn(
            f"{why}. Until then, batch normalization runs on TensorFlow's own operations, which is slower than the "
            "kernels, but no slower than without tfops. TFOPS_STRICT=1 makes this an error",
            RuntimeWarning,
            stacklevel=_level_of_user(),
        )
    return True


def beside_forward() -> Any:
    """The scope to make gradient ops in: if GPUs cannot be served, the forward ops were made for a CPU."""
    return _ANYWHERE if _served or _all_served() else tf.device("/CPU:0")


def _is_for_cpu() -> bool:
    """Whether a device scope names a CPU."""
    device = context.context().device_name if tf.executing_eagerly() else tf.no_op(name="tfops_device").device
    return bool(device) and tf.DeviceSpec.from_string(device).device_type == "CPU"


def _level_of_user() -> int:
    """How many frames above the caller the user's code begins: what is neither tfops' nor of what calls tfops."""
    frame: Any = sys._getframe(1)
    level = 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("tfops", "keras", "tensorflow"):
        frame, level = frame.f_back, level + 1
    return level
