"""All of these tests need csrc/simt."""

from __future__ import annotations

import pytest

from tfops_testing.requirements import has_source_tree

collect_ignore_glob = [] if has_source_tree() else ["*"]


@pytest.fixture(autouse=True)
def _nothing_is_refused(simt):
    """CUDA would start every launch that is made here. (Tests of refusals forget theirs.)"""
    simt.machine.reset_cuda_launches()
    yield
    assert simt.machine.cuda_launches()["refusals"] == []
