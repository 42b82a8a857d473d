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
def step():
    kept = [torch.ones(6 * 2**20) for _ in range(4)]
for _ in range(20):
    step()
before = faults()
for _ in range(20):
    step()
tiny = torch.tensor(1e-38) * 1e-3
print(json.dumps([faults() - before, float(tiny), torch.get_num_threads()]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_large_tensors_take_the_pages_of_those_before():
    ran = subprocess.run([sys.executable, "-c", LARGE_TENSORS], capture_output=True, text=True, check=True)
    new_pages, tiny, threads = json.loads(ran.stdout)
    assert new_pages < 500, "20 times 96 MiB have 491,520, or 960 large ones"
    assert (tiny, threads) == (0.0, 1)
