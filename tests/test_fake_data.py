"""Fake data: the same bytes and the same timeline as with numbers, without their memory."""

import dataclasses
import resource

import torch
from chain import Chain, loader, trainer
from torch import nn

from harmony_lightning import EmulatedCluster, HarmonyStrategy


def run(module, *, fake, memory="200KiB", batch_size=8):
    cluster = EmulatedCluster(2, memory, preset="3090", fake=fake)
    strategy = HarmonyStrategy(microbatch_size=2, cluster=cluster)
    trainer(strategy, max_steps=1).fit(module, loader(batch_size, batch_size))
    return strategy.timeline(), strategy.statistics()


def test_a_fake_step_moves_the_same_bytes_in_the_same_time():
    torch.manual_seed(0)
    (real, real_counts), (fake, fake_counts) = (run(Chain(depth=6), fake=fake) for fake in (False, True))
    assert dataclasses.replace(fake_counts, peak_device_bytes=()) == dataclasses.replace(
        real_counts, peak_device_bytes=()
    )
    # The real kernel of the loss leaves 4 bytes more behind its result than its shape takes, for two microbatches here.
    peaks = zip(real_counts.peak_device_bytes, fake_counts.peak_device_bytes, strict=True)
    assert all(0 <= real - fake <= 8 for real, fake in peaks)
    assert [span for span in fake.spans if span.device >= 0] == [span for span in real.spans if span.device >= 0]


class _Large(Chain):
    """4 GiB of weights."""

    def __init__(self):
        super().__init__(depth=1)
        with torch.device("meta"):
            self.wide = nn.Sequential(nn.Linear(64, 2**24), nn.Linear(2**24, 64)).to(torch.float16)
        self.wide.to_empty(device="cpu")

    def step(self, batch):
        inputs, targets = batch
        return super().step((self.wide(inputs.half()).float(), targets))


def test_a_model_without_numbers_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timeline, counts = run(_Large(), fake=True, memory="24GiB")
    assert counts.swap_in_bytes > 4 * 2**30 and timeline.seconds > 0.1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: less than 1 GiB


def test_host_memory_may_be_larger_than_the_host():
    """Stashes of a large step lie in one piece."""
    buffer = EmulatedCluster(fake=True).host_buffer(2**42)
    assert (type(buffer), buffer.dtype, buffer.numel()) == (torch.Tensor, torch.uint8, 2**42)
