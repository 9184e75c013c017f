import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, trainer
from torch import nn

from harmony_lightning import EmulatedCluster, UnsupportedError
from harmony_lightning.hardware.host import HostDevice
from harmony_lightning.runtime.counters import Counters
from harmony_lightning.runtime.weights.buffers import BufferStore
from harmony_lightning.testing import Comparison, train_harmony, train_plain


class Home(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.arange(4.0))
        self.register_buffer("count", torch.tensor(7))


@pytest.fixture
def cluster():
    cluster = EmulatedCluster(2, "1MiB")
    with cluster.activate():
        yield cluster


@pytest.fixture
def store():
    return BufferStore(Counters())


MEAN_BYTES = 16


def test_a_device_gets_one_copy_from_the_host(cluster, store):
    home, (one, _) = Home(), cluster.devices
    copy = store.fetch((home, "mean"), one)
    assert copy.device == one.torch_device
    assert copy.tolist() == [0, 1, 2, 3]
    assert store.fetch((home, "mean"), one) is copy
    assert (store._counters.input_bytes, store._counters.p2p_bytes) == (MEAN_BYTES, 0)


@pytest.mark.parametrize(("size", "waits"), [(4, False), (2**17, False), (2**18 + 1, True)])
def test_nobody_waits_for_small_ones(size, waits, monkeypatch):
    cluster, home, seen = EmulatedCluster(1, "4MiB"), Home(), []
    home.mean = torch.ones(size)
    monkeypatch.setattr(cluster.machine, "synchronize", seen.append)
    with cluster.activate():
        copy = BufferStore(Counters()).fetch((home, "mean"), cluster.devices[0])
        assert bool(seen) is waits
        assert copy.sum() == size


def test_another_device_gets_its_copy_from_the_holder(cluster, store):
    home, (one, two) = Home(), cluster.devices
    store.fetch((home, "mean"), one)
    assert store.fetch((home, "mean"), two).tolist() == [0, 1, 2, 3]
    assert (store._counters.input_bytes, store._counters.p2p_bytes) == (MEAN_BYTES, MEAN_BYTES)


def test_writes_are_seen_by_whoever_comes_next_in_order(cluster, store):
    home, (one, two) = Home(), cluster.devices
    place = (home, "mean")
    stale = store.fetch(place, two)
    for device in (one, two, one):
        value = store.fetch(place, device)
        value.add_(1)
        store.written(place, device, value)
    assert store.fetch(place, two).tolist() == [3, 4, 5, 6]
    assert stale.tolist() == [0, 1, 2, 3]
    assert home.mean.tolist() == [0, 1, 2, 3]


def test_written_buffers_go_home_into_the_module_s_own_tensors(cluster, store):
    home, (one, two) = Home(), cluster.devices
    mean, count = home.mean, home.count
    store.fetch((home, "count"), two)
    value = store.fetch((home, "mean"), one)
    store.written((home, "mean"), one, value.add_(1))
    store.flush()
    assert home.mean is mean
    assert mean.tolist() == [1, 2, 3, 4]
    assert home.count is count
    assert mean.device.index is None
    del value
    assert [device.allocated_bytes() for device in cluster.devices] == [0, 0]


def test_after_a_flush_the_host_s_value_counts(cluster, store):
    home, (one, _) = Home(), cluster.devices
    store.fetch((home, "mean"), one)
    store.flush()
    home.mean.zero_()
    assert store.fetch((home, "mean"), one).tolist() == [0] * 4


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(4, dtype=torch.float64)])
def test_a_buffer_of_another_shape_or_type_replaces_the_module_s(cluster, store, value):
    home, (one, _) = Home(), cluster.devices
    store.fetch((home, "mean"), one)
    store.written((home, "mean"), one, value.to(one.torch_device))
    store.flush()
    assert (home.mean.shape, home.mean.dtype) == (value.shape, value.dtype)
    assert home.mean.device == torch.device("cpu")
    assert type(home.mean) is torch.Tensor


def test_clean_copies_can_be_dropped_written_ones_stay(cluster, store):
    home, (one, _) = Home(), cluster.devices
    store.fetch((home, "count"), one)
    value = store.fetch((home, "mean"), one)
    store.written((home, "mean"), one, value.add_(1))
    del value
    before = one.allocated_bytes()
    store.drop_clean()
    assert before - one.allocated_bytes() == 8
    store.flush()
    assert home.mean.tolist() == [1, 2, 3, 4]


def test_a_failed_pass_leaves_the_module_s_values(cluster, store):
    home, (one, _) = Home(), cluster.devices
    value = store.fetch((home, "mean"), one)
    store.written((home, "mean"), one, value.add_(1))
    store.discard()
    store.flush()
    assert home.mean.tolist() == [0, 1, 2, 3]


def test_the_host_as_device_gets_a_copy_too(store):
    home = Home()
    value = store.fetch((home, "mean"), HostDevice())
    value.add_(1)
    assert home.mean.tolist() == [0, 1, 2, 3]
    store.written((home, "mean"), HostDevice(), value)
    store.flush()
    assert home.mean.tolist() == [1, 2, 3, 4]


def test_buffers_of_the_same_name_in_two_modules_are_two(cluster, store):
    first, second = Home(), Home()
    second.mean.zero_()
    (one, _) = cluster.devices
    assert store.fetch((first, "mean"), one).tolist() == [0, 1, 2, 3]
    assert store.fetch((second, "mean"), one).tolist() == [0] * 4


def test_copies_are_no_inference_tensors(cluster, store):
    home = Home()
    with torch.inference_mode():
        copy = store.fetch((home, "mean"), cluster.devices[0])
    assert not copy.is_inference()


class Many(nn.Module):
    def __init__(self, count=8):
        super().__init__()
        for index in range(count):
            self.register_buffer(f"b{index}", torch.full((4,), float(index)))


def test_the_oldest_clean_copies_give_way(cluster):
    home, one = Many(), cluster.devices[0]
    store = BufferStore(Counters(), limit_nbytes=2 * MEAN_BYTES)
    for index in range(8):
        assert store.fetch((home, f"b{index}"), one).tolist() == [index] * 4
        assert one.allocated_bytes() <= 3 * MEAN_BYTES  # the one in hand beside those held
    assert store.fetch((home, "b7"), one) is store.fetch((home, "b7"), one)
    assert store._counters.input_bytes == 8 * MEAN_BYTES
    store.fetch((home, "b0"), one)
    assert store._counters.input_bytes == 9 * MEAN_BYTES


def test_written_copies_stay_whatever_comes(cluster):
    home, (one, two) = Many(), cluster.devices
    store = BufferStore(Counters(), limit_nbytes=MEAN_BYTES)
    for index in range(8):
        value = store.fetch((home, f"b{index}"), one)
        value.add_(1)
        store.written((home, f"b{index}"), one, value)
    for index in range(8):
        assert store.fetch((home, f"b{index}"), two).tolist() == [index + 1] * 4
        assert store.fetch((home, f"b{index}"), one).tolist() == [index + 1] * 4
    store.flush()
    assert [getattr(home, f"b{index}")[0].item() for index in range(8)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_user_code_finds_what_a_forward_has_written(cluster, store):
    home, (one, two) = Home(), cluster.devices
    store.fetch((home, "count"), two)
    store.written((home, "mean"), one, store.fetch((home, "mean"), one) + 1)
    other = torch.zeros(4)
    assert store.come_home(other) is other
    assert store.come_home(home.mean) is home.mean
    assert home.mean.tolist() == [1, 2, 3, 4]
    home.mean.zero_()
    assert store.fetch((home, "mean"), two).tolist() == [0, 0, 0, 0]
    store.come_home(home.count.add_(1))
    assert store.fetch((home, "count"), two) == 8
    store.come_home(home.count)
    store.come_home(home.mean)
    assert store.is_empty
    assert not +store._clean_nbytes


class Graph(nn.Module):
    """Sums over neighbours in a fixed graph, which is a sparse buffer."""

    def __init__(self, layout):
        super().__init__()
        self.register_buffer("neighbours", (torch.rand(WIDTH, WIDTH) < 0.1).float().to_sparse(layout=layout))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return (self.neighbours @ self.linear(x).T).T.relu()


class OnGraph(Chain):
    def __init__(self, layout):
        super().__init__(depth=2)
        self.graph = Graph(layout)

    def step(self, batch):
        inputs, targets = batch
        between = (self.graph.neighbours @ self.net(inputs).T).T
        return nn.functional.mse_loss(self.head(self.graph(between)).squeeze(1), targets)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("microbatch_size", [2, 8])
def test_sparse_ones_of_layers_and_between_layers(layout, microbatch_size):
    batches = list(loader(8))
    expected = train_plain(lambda: OnGraph(layout), batches, microbatch_size)
    actual = train_harmony(lambda: OnGraph(layout), batches, microbatch_size, cluster=None)
    report = Comparison(expected=expected, actual=actual)
    assert report.is_equal, str(report)


def test_emulated_gpus_refuse_sparse_ones():
    with pytest.raises(UnsupportedError, match="emulated GPUs hold dense tensors only"):
        trainer(harmony()).fit(OnGraph(torch.sparse_coo), loader(8))
