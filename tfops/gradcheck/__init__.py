"""Checks derivatives against difference quotients: those of any TensorFlow function, and of tfops' own op.

report = check(function, inputs)      # reverse mode of first and second order, and forward mode
results = check_op(Case("NHWC"))      # tfops.fused_batch_norm in every dtype

python -m tfops.gradcheck                          # the op in every combination
python -m tfops.gradcheck --function module:name   # any function
"""

from tfops.gradcheck._check import check
from tfops.gradcheck._op import Case, Result, check_op
from tfops.gradcheck._program import main
from tfops.gradcheck._report import Report, Row

__all__ = ["Case", "Report", "Result", "Row", "check", "check_op", "main"]
