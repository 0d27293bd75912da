"""The emulator of tests/cuda_emulator finds each planted bug, and nothing where there is none."""

import ctypes
import functools

import pytest
from cuda_emulator import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")

# As `Bug` of planted.cu: name, and what must be said about it (one of these).
BUGS = [
    ("none", None),
    ("missing __syncthreads", ("with no barrier between them", "which nothing wrote")),
    ("missing __syncwarp", ("with no barrier between them", "which nothing wrote")),
    ("off by one at the tail", "outside of all memory, 0 behind x"),
    ("wrong shuffle mask", "exchange between lanes"),
    ("shuffle that not all lanes reach", "exchange between lanes"),
    ("value of a lane outside the mask", "takes the value of lane 20"),
    ("two threads write one place", "race: writes shared memory"),
    ("unwritten output", "which nothing wrote"),
    ("return before a barrier", "threads reached a barrier"),
    ("missing __threadfence", "with no fence and atomic between them"),
    ("unwritten shared memory", "reads shared memory"),
    ("write past an array in shared memory", "shared memory outside of all arrays"),
    ("access that is not aligned", "not aligned"),
    ("write to an input", "read-only"),
    ("missing cluster_sync", ("no fence and atomic between", "not come to", "which nothing wrote")),
    ("block that ends while another reads its shared memory", "of the cluster, which has ended"),
]
SEEDS = 20


@functools.cache
def planted() -> build.Emulator:
    return build.Emulator(build.build("planted", [build.HERE / "planted.cu"]))


def run(bug: int, seed: int) -> tuple[str, float, tuple[int, ...]]:
    """What was found, the sum, and the turn of each block."""
    emulator = planted()
    emulator.seed(seed)
    total, order = ctypes.c_float(), (ctypes.c_uint * 5)()
    emulator.library.run_planted.restype = ctypes.c_char_p
    found = emulator.library.run_planted(bug, ctypes.byref(total), order).decode()
    return found, total.value, tuple(order)


# Whether a block ends before another reads from it is up to the schedule.
UNLUCKY = {"block that ends while another reads its shared memory"}


@pytest.mark.parametrize("bug", range(1, len(BUGS)), ids=[name for name, _ in BUGS[1:]])
def test_each_planted_bug_is_found(bug):
    """In every schedule, not only in an unlucky one, where the bug is one in all of them."""
    name, expected = BUGS[bug]
    expected = (expected,) if isinstance(expected, str) else expected
    seen = [run(bug, seed)[0] for seed in range(SEEDS)]
    right = [any(text in found for text in expected) for found in seen]
    assert any(right) if name in UNLUCKY else all(right), seen


def test_nothing_is_found_where_nothing_is_wrong():
    """... and the sum has the same bits in every schedule, in which the blocks come in different orders."""
    expected = sum(0.5 + i % 7 for i in range(64 * 5 - 3))
    orders = set()
    for seed in range(SEEDS):
        found, total, order = run(0, seed)
        assert found == ""
        assert total == expected
        assert sorted(order) == list(range(5))
        orders.add(order)
    assert len(orders) > SEEDS / 2, "the schedules are all alike"


def test_the_ledger_counts_bytes_and_widths():
    emulator = planted()
    emulator.clear_ledger()
    assert run(0, 1)[0] == ""
    launch, cluster, halve = emulator.ledger()
    names = [entry["kernel"] for entry in (launch, cluster, halve)]
    assert names == ["sum_kernel", "cluster_kernel", "halve_kernel"]
    assert (launch["blocks"], cluster["blocks"]) == (5, 4)
    memory = {entry["name"]: entry for entry in launch["memory"]}
    n = 64 * 5 - 3
    assert memory["x"]["read"] == memory["x"]["unique_read"] == 4 * n
    assert memory["x"]["read_widths"] == {"4": n}
    assert memory["doubled"]["written"] == 4 * n and memory["doubled"]["read"] == 0
    assert memory["parts"]["written"] == memory["parts"]["read"] == 20
