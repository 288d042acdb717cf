"""All of these tests need TensorFlow."""

from __future__ import annotations

from tfops_testing.requirements import has_tensorflow

collect_ignore_glob = [] if has_tensorflow() else ["*"]
