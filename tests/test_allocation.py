"""Memory that a process keeps: the system has to hand a freed tensor's pages out again, or it has not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from fl_privacy.allocation import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for passes in range(30):
    if passes == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 20) for _ in range(8)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Counts page faults of ten passes of 8 tensors of 4 MiB, 1,024 pages each, after twenty such passes."""


def faults(how: str) -> int:
    """Page faults where the C library maps every tensor by itself, as it does until it has learned their sizes."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again_without_the_system() -> None:
    pages = 10 * 8 * 1024
    assert faults("return") > 0.5 * pages
    assert faults("keep") < 0.2 * pages
