"""All of these tests need csrc/simt."""

from __future__ import annotations

from tfops_testing.requirements import has_source_tree

collect_ignore_glob = [] if has_source_tree() else ["*"]
