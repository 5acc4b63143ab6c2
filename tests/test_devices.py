"""The devices and what belongs to them."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# In a process of its own, since other tests leave free memory of theirs. What is resident does not depend on where the
# allocator finds room, as the number of page faults does.
RESIDENT = """
import json, psutil, torch
from ditcli.devices import give_back_memory, open_device

def resident_after_a_tensor():
    torch.empty(2**24).fill_(1)  # 64 MB
    return psutil.Process().memory_info().rss

resident_after_a_tensor()  # the first starts torch's threads
resident = [resident_after_a_tensor()]
device = open_device("cpu")
resident.append(resident_after_a_tensor())
give_back_memory(device)
resident.append(resident_after_a_tensor())
print(json.dumps(resident))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory its own way")
def test_the_memory_of_a_tensor_is_kept_for_the_next_until_it_is_given_back():
    printed = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True).stdout
    before, kept, given_back = (size / 2**20 for size in json.loads(printed))
    assert kept > before + 60
    assert given_back < before + 4
