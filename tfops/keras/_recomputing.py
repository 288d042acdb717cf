"""Code that `tf.recompute_grad` runs twice: for the result, then for the gradient."""

from __future__ import annotations

import sys
import types
import warnings

_MODULE = "tensorflow.python.ops.custom_gradient"
_TRACING = "tensorflow.python.eager.polymorphic_function"


def is_recomputed() -> bool:
    """Whether the caller runs for the second time, when what changes a state is not to be done again.

    TensorFlow does not tell. But its functions that run the code are on the stack, in graphs while they are traced.
    What a `tf.function` in between has traced the first time, it runs again the second: of that there is a warning.
    """
    frame: types.FrameType | None = sys._getframe(1)
    inner = ""
    is_traced = is_reused = False
    while frame is not None:
        module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if module == _MODULE and name == "inner_recompute_grad":
            return True
        is_reused |= is_traced and module == _MODULE and name == "inner"
        # Branches and loops are traced by the same function, but anew each time.
        is_traced |= inner == "func_graph_from_py_func" and module.startswith(_TRACING)
        inner, frame = name, frame.f_back
    if is_reused:
        warnings.warn(
            "tf.recompute_grad runs a tf.function twice in each step, so that the moving statistics of the batch norms "
            "in it take in each batch twice: give it what the tf.function is made of, its python_function",
            stacklevel=3,
        )
    return False
