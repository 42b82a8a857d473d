"""What a process that trains asks of its CPU."""

import ctypes
import json
import subprocess
import sys

import pytest

LARGE_TENSORS = """
import json, resource, torch
from pipeline.train.cpu import set_up_cpu
set_up_cpu(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
before = faults()
for _ in range(20):
    torch.ones(2**24)
tiny = torch.tensor(1e-38) * 1e-3
print(json.dumps([faults() - before, float(tiny), torch.get_num_threads()]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_large_tensors_take_the_pages_of_those_before():
    ran = subprocess.run([sys.executable, "-c", LARGE_TENSORS], capture_output=True, text=True, check=True)
    new_pages, tiny, threads = json.loads(ran.stdout)
    assert new_pages < 1000, "20 tensors of 64 MiB have 327,680"
    assert (tiny, threads) == (0.0, 1)
