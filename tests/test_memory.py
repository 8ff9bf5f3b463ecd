"""Freed memory is reused: a large tensor costs no page faults once it was there before."""

import resource
import sys
from statistics import median

import pytest
import torch

from crosslayer.memory import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")
def test_a_large_tensor_made_again_faults_no_pages():
    keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(12_000_000).sum()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    counts = [faults() for _ in range(11)]
    assert median(counts) < 100  # 48 MB are 12,000 pages; what else was freed before decides how soon a place is found
