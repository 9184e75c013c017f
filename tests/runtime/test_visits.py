"""Which pack comes next on each device, as far as it can be known."""

from types import SimpleNamespace

import pytest

from harmony_lightning.runtime.visits import next_in_backward

THREE = [SimpleNamespace(index=index) for index in range(3)]


def plan(num_devices, device):
    return SimpleNamespace(num_devices=num_devices, device=device)


@pytest.mark.parametrize(
    ("pack", "differentiated", "following"),
    [
        (5, range(6), {0: 4, 1: 3}),
        (5, {0, 1, 2, 5}, {0: 2, 1: 1}),  # packs whose weights no backward needs are passed over
        (1, range(6), {0: 0}),
        (0, range(6), {}),
    ],
)
def test_in_backward_each_device_comes_to_the_pack_before(pack, differentiated, following):
    dealt_round = plan(2, lambda pack, microbatch: pack % 2)
    assert next_in_backward(dealt_round, pack, THREE, differentiated) == following


def test_where_microbatches_are_dealt_all_devices_come_to_the_same_pack():
    by_microbatch = plan(3, lambda pack, microbatch: microbatch)
    assert next_in_backward(by_microbatch, 4, THREE[:2], range(5)) == {0: 3, 1: 3}
