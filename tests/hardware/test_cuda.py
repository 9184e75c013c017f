"""What CUDA is asked for, as far as that can be seen without a GPU: its calls are recorded."""

import contextlib
import gc
import threading
from types import SimpleNamespace

import pytest
import torch

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.hardware.cuda import CudaCluster
from harmony_lightning.hardware.device import Lane
from harmony_lightning.runtime.worker import HostWorker


@pytest.fixture
def calls(monkeypatch):
    """Calls of CUDA's runtime, in their order, and the GPU that is current in each thread."""
    seen = SimpleNamespace(registered={}, unregistered=[], current=threading.local(), error=0, fractions={})

    def register(address, nbytes, flags):
        seen.registered[address] = nbytes
        return seen.error

    @contextlib.contextmanager
    def device(torch_device):
        before = getattr(seen.current, "device", None)
        seen.current.device = torch_device
        yield
        seen.current.device = before

    cudart = SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda address: seen.unregistered.append((address, mapping_of(address))),
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: seen.fractions.update({device.index: share}),
    )
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda device: seen.fractions.get(device.index, 1.0)
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", device)
    return seen


def mapping_of(address):
    """The line of this process's memory map for an address."""
    with open("/proc/self/maps") as file:
        for line in file:
            start, stop = (int(end, 16) for end in line.split()[0].split("-"))
            if start <= address < stop:
                return line.split()[1]
    return None


def cluster_of(*indices):
    return CudaCluster([torch.device("cuda", index) for index in indices])


def test_host_memory_is_pinned_whole_and_shared_with_children(calls):
    buffer = cluster_of(0).host_buffer(10_000)
    assert buffer.shape == (10_000,) and buffer.dtype is torch.uint8
    assert calls.registered == {buffer.data_ptr(): 10_000}
    assert buffer.data_ptr() % 4096 == 0
    assert mapping_of(buffer.data_ptr()) == "rw-s"


def test_host_memory_is_unpinned_before_it_goes_when_the_last_view_is_gone(calls):
    buffer = cluster_of(0).host_buffer(100 * 2**20)
    address, view = buffer.data_ptr(), torch.frombuffer(buffer.numpy(), dtype=torch.float32)[5:]
    del buffer
    gc.collect()
    assert not calls.unregistered
    view.fill_(1)
    del view
    gc.collect()
    assert calls.unregistered == [(address, "rw-s")]
    assert mapping_of(address) is None


def test_no_memory_is_pinned_for_nothing(calls):
    assert cluster_of(0).host_buffer(0).numel() == 0
    assert not calls.registered


def test_memory_that_cannot_be_had_is_told(calls):
    with pytest.raises(MemoryError, match=r"in one piece"):
        cluster_of(0).host_buffer(2**60)


def test_memory_that_cannot_be_pinned_serves_all_the_same(calls, caplog, monkeypatch):
    monkeypatch.setattr(CudaCluster, "_clear_last_error", lambda self: None)
    calls.error = 2
    cluster = cluster_of(0)
    buffers = [cluster.host_buffer(100).zero_() for _ in range(2)]
    assert caplog.text.count("cudaHostRegister error 2") == 1
    del buffers
    gc.collect()
    assert not calls.unregistered


def test_a_limit_is_lifted_to_what_there_was_before(calls):
    calls.fractions[1] = 0.75
    cluster = CudaCluster([torch.device("cuda", index) for index in range(2)], memory_bytes=2**33)
    assert calls.fractions == {0: 0.5, 1: 0.5}
    cluster.close()
    cluster.close()
    assert calls.fractions == {0: 1.0, 1: 0.75}


def test_where_one_gpu_is_too_small_for_a_limit_none_gets_it(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2 ** (34 - device.index)))
    with pytest.raises(ConfigurationError, match="gpu1 has 8 GiB; set memory to at most that"):
        CudaCluster([torch.device("cuda", index) for index in range(2)], memory_bytes=2**33 + 1)
    assert not calls.fractions


def test_no_more_is_offered_than_the_process_is_allowed(calls):
    free = cluster_of(0).devices[0].memory_bytes
    calls.fractions[0] = 0.25
    assert cluster_of(0).devices[0].memory_bytes == 2**32 < free
    calls.fractions[0] = 0.99  # others have the rest
    assert cluster_of(0).devices[0].memory_bytes == free


def test_threads_work_on_a_gpu_of_the_cluster(calls):
    worker, seen = HostWorker(cluster_of(1, 2)), []
    worker.submit(lambda: seen.append(calls.current.device))
    worker.drain()
    worker.close()
    assert seen == [torch.device("cuda", 1)]


def test_a_lane_is_one_stream_whoever_comes_first(calls, monkeypatch):
    (device,) = cluster_of(0).devices
    is_amid, may_end, found = threading.Event(), threading.Event(), []

    def make(torch_device):
        if threading.current_thread() is thread:
            is_amid.set()
            may_end.wait()
        return object()

    monkeypatch.setattr(torch.cuda, "Stream", make)
    thread = threading.Thread(target=lambda: found.append(device._stream(Lane.SWAP_IN)))
    thread.start()
    is_amid.wait()
    found.append(device._stream(Lane.SWAP_IN))
    may_end.set()
    thread.join()
    assert found[0] is found[1] is device._stream(Lane.SWAP_IN)
