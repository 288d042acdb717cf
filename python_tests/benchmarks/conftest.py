"""All of these tests need benchmarks/; some need TensorFlow, too, and say so."""

from __future__ import annotations

from tfops_testing.requirements import has_source_tree

collect_ignore_glob = [] if has_source_tree() else ["*"]
