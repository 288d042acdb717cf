"""The tests of the package need TensorFlow."""

from __future__ import annotations

from tfops_testing.requirements import has_tensorflow

collect_ignore = [] if has_tensorflow() else ["test_docstrings.py", "test_package.py"]
