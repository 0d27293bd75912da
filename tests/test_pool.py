"""The pool of activation buffers: reuse, its bound, its lifetime, and that it serves nobody else."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import bnfast
from bnfast import native

pytestmark = pytest.mark.skipif(
    native.unavailable is not None or sys.platform != "linux", reason="needs the extension on Linux"
)
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def empty_pool():
    gc.collect()
    bnfast.clear_cache()
    yield
    bnfast.clear_cache()


def stats():
    return native._C.pool_stats()


def pooled(*shape):
    native._C.enter_pool()
    try:
        return torch.empty(shape)
    finally:
        native._C.leave_pool()


def test_a_freed_buffer_serves_the_next_request():
    before = stats()["used"]
    first = pooled(1 << 20)
    address = first.data_ptr()
    assert stats()["used"] - before == 4 * MEGABYTE
    del first
    assert stats()["free"] >= 4 * MEGABYTE
    again = pooled(1 << 20)
    assert again.data_ptr() == address


def test_nothing_outside_a_scope_and_nothing_small_comes_from_it():
    before = stats()
    torch.empty(1 << 20)
    pooled(100)
    after = stats()
    assert (after["hits"], after["misses"]) == (before["hits"], before["misses"])


def test_another_thread_is_not_in_this_threads_scope():
    before = stats()
    native._C.enter_pool()
    try:
        thread = threading.Thread(target=lambda: torch.empty(1 << 20))
        thread.start()
        thread.join()
    finally:
        native._C.leave_pool()
    after = stats()
    assert (after["hits"], after["misses"]) == (before["hits"], before["misses"])


def test_a_tensor_outlives_the_scope_and_is_freed_by_any_thread():
    value = [pooled(1 << 18).fill_(3.0)]
    assert (value[0] == 3).all()
    used = stats()["used"]
    thread = threading.Thread(target=value.clear)
    thread.start()
    thread.join()
    assert stats()["used"] == used - MEGABYTE


def test_buffers_in_use_do_not_overlap():
    tensors = [
        pooled(size).fill_(i) for i, size in enumerate([300_000, 17_000, 1 << 20, 17_001] * 3)
    ]
    for i, tensor in enumerate(tensors):
        assert (tensor == i).all()


def test_it_holds_at_most_half_more_than_was_in_use_at_once():
    for size in range(1 << 18, 1 << 22, 100_000):
        pair = [pooled(size), pooled(size // 2)]
        del pair
        s = stats()
        assert s["used"] + s["free"] <= 1.5 * s["most_used"] + 2 * 65536


def test_clear_cache_empties_it_and_leaves_buffers_in_use():
    kept = pooled(1 << 20).fill_(7.0)
    del_me = pooled(1 << 20)
    del del_me
    bnfast.clear_cache()
    assert stats()["free"] == 0
    assert (kept == 7).all()


def test_storage_of_a_pooled_tensor_can_grow():
    value = pooled(1 << 18).fill_(2.0)
    value.resize_(1 << 19)
    assert (value[: 1 << 18] == 2).all()


def test_a_training_step_is_served_without_new_pages():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 32, 3, padding=1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
    )  # fmt: skip
    net = bnfast.convert(net)
    x = torch.randn(8, 3, 48, 48)
    dy = torch.randn(8, 32, 48, 48)
    for _ in range(3):
        net(x).backward(dy)
    misses = stats()["misses"]
    net(x).backward(dy)
    assert stats()["misses"] == misses


def test_it_can_be_switched_off():
    code = (
        "import torch; from bnfast import native; native._C.enter_pool(); torch.empty(1 << 20);"
        "print(native._C.pool_stats()['misses'])"
    )
    for value, misses in (("0", "0"), ("1", "1")):
        env = {**os.environ, "BNFAST_POOL": value}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == misses


def test_a_forked_child_can_use_it():
    del_me = pooled(1 << 20)
    del del_me
    child = os.fork()
    if child == 0:  # no parallel loop in here: OpenMP's threads are not in the child
        value = pooled(1 << 20)
        value[0] = 1.0
        os._exit(0 if value[0] == 1 else 1)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0
