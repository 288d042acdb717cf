"""All of these tests need models/, and what its programs import."""

from __future__ import annotations

from tfops_testing.requirements import has_model_packages, has_source_tree, has_tensorflow

collect_ignore_glob = [] if has_tensorflow() and has_model_packages() and has_source_tree() else ["*"]
