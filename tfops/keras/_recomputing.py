"""Code that `tf.recompute_grad` runs twice: for the result, then for the gradient."""

from __future__ import annotations

import sys
import types


def is_recomputed() -> bool:
    """Whether the caller runs for the second time, when what changes a state is not to be done again.

    TensorFlow does not tell. But its function that recomputes is on the stack, in graphs while they are traced.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "inner_recompute_grad" and frame.f_globals.get("__name__") == _MODULE:
            return True
        frame = frame.f_back
    return False


_MODULE = "tensorflow.python.ops.custom_gradient"
