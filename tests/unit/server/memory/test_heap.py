"""What is allocated while weights are read, by glibc's own count."""

from __future__ import annotations

import ctypes
import os
import subprocess

import pytest
from support.forkserver import WARM

from swarm_notebook.server.memory import heap

# Where all of a process's memory lies is the process's, too.
_APART = """
import ctypes, torch
from swarm_notebook.server.memory import heap

names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

class Info(ctypes.Structure):  # glibc's struct mallinfo2
    _fields_ = tuple((name, ctypes.c_size_t) for name in names.split())

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
mapped = lambda: mallinfo2().hblkhd  # bytes of allocations that are mappings of their own
size = 8 << 20
with heap.apart():
    before = mapped()
    # Holes that others have left in the heap are filled first.
    weights = []
    while mapped() - before < size and len(weights) < 64:
        weights.append(torch.empty(size, dtype=torch.uint8))
    assert mapped() - before >= size
    weights.clear()
    assert mapped() == before
activations = torch.empty(size, dtype=torch.uint8)
assert mapped() == before
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_weights_lie_apart_and_activations_do_not() -> None:
    subprocess.run([*WARM, _APART], check=True)


# What oneDNN has compiled is the process's.
_COMPILING = """
import psutil, torch
from swarm_notebook.server.memory import heap
if {bound}: heap.bound_compiled()
weight = torch.zeros(64, 64, dtype=torch.bfloat16)
product = torch.nn.functional.linear
product(torch.zeros(300, 64, dtype=torch.bfloat16), weight)
before = psutil.Process().memory_info().rss
for tokens in range(1, 577):
    product(torch.zeros(tokens, 64, dtype=torch.bfloat16), weight)
print(psutil.Process().memory_info().rss - before)
"""


def test_prompts_of_many_lengths_leave_little_behind() -> None:
    taken = []
    for bound in (True, False):
        environment = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
        command = [*WARM, _COMPILING.format(bound=bound)]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        taken.append(int(found.stdout))
    if taken[1] < 32 << 20:
        pytest.skip("oneDNN compiles nothing here")
    assert taken[0] < taken[1] / 2


def test_a_c_library_that_is_not_glibcs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: it has neither call."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    heap.freeze()
    with heap.apart():
        heap.trim()
