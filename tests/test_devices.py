"""The devices and what belongs to them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# In a process of its own: what other tests have left decides where the allocator finds room.
FAULTS = """
import resource, torch
from ditcli.devices import open_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)  # 64 MB, of 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

open_device("cpu")
print(sorted(faults() for _ in range(7))[3])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory its own way")
def test_what_a_tensor_leaves_is_used_again_without_a_page_fault():
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    assert int(printed) < 1000
