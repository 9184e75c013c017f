"""The same promises on a real GPU: results of plain training on it, the plan's bytes, the limit kept."""

import os

import pytest
import torch
from chain import loader, same_weights, trainer, twins

from harmony_lightning import HarmonyStrategy
from harmony_lightning.hardware.cuda import CudaCluster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ON_GPU = {"accelerator": "gpu", "devices": 1}
MEMORY = "4GiB"
"""CUDA's context and libraries take some of it, whatever the model."""


def fit(strategy, module, batch_size, **options):
    fitted = trainer(strategy, **ON_GPU, **options)
    fitted.fit(module, loader(batch_size))
    return fitted


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_equals_plain_training_on_the_gpu_up_to_the_optimizer(optimizer):
    """Gradients are those of the GPU to the bit; the update runs on the host, whose division and root round otherwise."""
    ours, reference = twins(optimizer=optimizer)
    fit("auto", reference, 2, accumulate_grad_batches=4)
    fit(HarmonyStrategy(microbatch_size=2, memory=MEMORY, layers=["net.*"]), ours, 8)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("stash", ["device", "host"])
def test_swapped_bytes_are_the_plan_s_and_memory_stays_under_the_limit(stash):
    module, _ = twins()
    strategy = HarmonyStrategy(
        microbatch_size=2, memory=MEMORY, stash=stash, plan="sizes", update="host", one_layer_per_pack=True
    )
    fitted = fit(strategy, module, 8)
    statistics, plan = fitted.strategy.statistics(), fitted.strategy.plan
    assert statistics.swap_in_bytes == plan.swap_in_bytes(is_first=True) + 4 * plan.swap_in_bytes_per_step > 0
    assert statistics.swap_out_bytes == 5 * plan.swap_out_bytes_per_step
    assert max(statistics.peak_device_bytes) <= plan.memory_bytes
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())


def test_host_and_device_stash_give_the_same_weights():
    ours, others = twins()
    for module, stash in (ours, "device"), (others, "host"):  # one plan: another one might update elsewhere
        fit(HarmonyStrategy(microbatch_size=2, memory=MEMORY, stash=stash, plan="sizes"), module, 8)
    assert same_weights(ours, others)


def test_what_the_host_writes_while_a_child_process_lives_arrives():
    """Were the memory private, a fork might leave the GPU with pages that the host does not write any more."""
    buffer = CudaCluster([torch.device("cuda", 0)]).host_buffer(2**20).zero_()
    assert buffer.is_pinned()
    may_end, end = os.pipe()
    if (child := os.fork()) == 0:
        os.read(may_end, 1)
        os._exit(0)
    buffer.fill_(7)
    arrived = buffer.to("cuda:0", non_blocking=True)
    os.write(end, b"1")
    os.waitpid(child, 0)
    assert bool((arrived == 7).all())
