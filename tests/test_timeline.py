"""A run on emulated GPUs with a preset yields a timeline, the same one every time."""

import dataclasses
import itertools
import json

import pytest
import torch
from chain import Chain, loader, trainer
from torch.utils.data import DataLoader, TensorDataset
from wide import Wide, batch_of, cluster_of, on_meta

from harmony_lightning import ConfigurationError, EmulatedCluster, HarmonyStrategy
from harmony_lightning.decomposer.discover import decompose
from harmony_lightning.observability.trace import chrome_trace
from harmony_lightning.plan.timeline import HOST, Timeline
from harmony_lightning.scheduler import make_plan


def timeline(preset="3090", **options):
    torch.manual_seed(0)
    cluster = EmulatedCluster(2, "200KiB", preset=preset)
    strategy = HarmonyStrategy(microbatch_size=2, mode="pp", cluster=cluster, **options)
    trainer(strategy).fit(Chain(depth=6), loader(8, 16))
    return strategy.timeline(), strategy.statistics()


def test_two_runs_have_equal_timelines_to_the_bit():
    (one, _), (other, _) = timeline(), timeline()
    assert one == other and one.seconds > 0


def test_steps_follow_each_other_on_a_timeline():
    torch.manual_seed(0)
    strategy = HarmonyStrategy(microbatch_size=2, cluster=EmulatedCluster(2, "200KiB", preset="3090"))
    trainer(strategy, max_steps=3).fit(Chain(depth=6), loader(8, 32))
    found = strategy.timeline()
    assert len(found.step_seconds) == 2 and 0.5 * found.seconds < sum(found.step_seconds) < found.seconds


def test_steps_are_found_where_the_first_pack_is_dealt_and_begins_on_another_gpu():
    counts = {"microbatch_size": 2, "num_microbatches": 4, "num_devices": 2}
    plan = make_plan(decompose(Chain(depth=6), 2**14), mode="pp", memory_bytes=200 * 1024, stash="device", **counts)
    plan = dataclasses.replace(plan, dealt=(0,), dealt_order=(1, 0))
    cluster = EmulatedCluster(2, "200KiB", preset="3090")
    strategy = HarmonyStrategy(microbatch_size=2, cluster=cluster, plan=plan)
    trainer(strategy, max_steps=3).fit(Chain(depth=6), loader(8, 32))
    found = strategy.timeline()
    assert len(found.step_seconds) == 2 and 0.5 * found.seconds < sum(found.step_seconds) < found.seconds


def test_a_timeline_holds_every_byte_and_keeps_the_order_of_lanes():
    found, statistics = timeline()

    def moved(lane):
        return sum(span.nbytes for d in range(2) for span in found.lane(d, lane))

    payload = statistics.swap_in_bytes
    assert payload <= moved("swap-in") < 1.001 * payload  # arenas travel with the gaps between weights
    assert moved("stash-in") == statistics.stash_in_bytes
    assert (
        statistics.p2p_bytes < moved("peer-out") < 1.01 * statistics.p2p_bytes
    )  # with losses on their way to the root
    for device in range(2):
        for lane in ("compute", "swap-in", "swap-out"):
            spans = found.lane(device, lane)
            assert spans and all(a.start <= a.end <= b.start for a, b in itertools.pairwise(spans))
            assert 0 < found.busy_seconds(device, lane) <= found.seconds
    assert any(span.device == HOST for span in found.spans)


def test_a_faster_gpu_is_not_slower():
    assert timeline("5090")[0].seconds <= timeline("1080ti")[0].seconds


def test_timelines_go_to_json_and_to_traces():
    found, _ = timeline()
    assert Timeline.from_json(found.to_json()) == found
    events = json.loads(chrome_trace(found))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(found.spans)
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"gpu0", "gpu1", "host"}


def test_no_preset_no_timeline():
    with pytest.raises(ConfigurationError, match="emulated"):
        HarmonyStrategy().timeline()


def _one_gpu(module_type):
    """Two microbatches of a module of four packs that all have to be swapped: strategy, module and data."""
    inputs, targets = (tensor.expand(32, *tensor.shape[1:]) for tensor in batch_of(1))
    data = DataLoader(TensorDataset(inputs, targets), batch_size=32)
    module = on_meta(lambda: module_type(3)).to_empty(device="cpu")
    layers = decompose(module, 2**26)
    options = {"memory_bytes": 2**30, "microbatch_size": 16, "num_microbatches": 2, "stash": "device"}
    plan = make_plan(layers, mode="pp", num_devices=1, one_layer_per_pack=True, **options)
    assert len(plan.packs) == 4 and not plan.resident
    return HarmonyStrategy(plan=plan, cluster=cluster_of(1)), module, data


def test_in_backward_weights_arrive_while_the_pack_before_computes():
    """The last pack's slot is free as soon as its backward is over, which is part of its forward."""
    strategy, module, data = _one_gpu(Wide)
    trainer(strategy).fit(module, data)
    spans = strategy.timeline().lane(0, "swap-in")
    arrived = {span.name: span.end for span in spans}
    starts = {span.name: span.start for span in reversed(strategy.timeline().lane(0, "compute"))}
    for pack in (0, 1):  # 2 is there since its forward
        assert arrived[f"weights of pack {pack}"] < starts[f"backward of pack {pack + 1}, microbatch 1"]


class _Evaluated(Wide):
    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


def test_in_evaluation_weights_arrive_while_the_pack_before_computes():
    """The host goes ahead of the GPU, which begins each swap-in when the one before has ended."""
    strategy, module, data = _one_gpu(_Evaluated)
    trainer(strategy).validate(module, data, verbose=False)
    swap_ins = [span for span in strategy.timeline().lane(0, "swap-in") if span.name.startswith("weights")]
    assert [span.name for span in swap_ins] == [f"weights of pack {pack}" for pack in range(4)]
    copied, first, *_ = strategy.timeline().lane(0, "compute")
    assert (copied.name, copied.nbytes) == ("copy", 32 * batch_of(1)[0].nbytes)  # the batch
    assert swap_ins[0].end <= first.start and swap_ins[1].start < first.end
    assert all(later.start == pytest.approx(one.end) for one, later in itertools.pairwise(swap_ins))


def test_who_updates_does_not_cast_what_travels():
    """Weights are cast for the next step by the threads that swap them in, one for each device."""
    inputs, targets = (tensor.expand(4 * 8, *tensor.shape[1:]) for tensor in batch_of(1))
    data = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    module = on_meta(lambda: Wide(3)).to_empty(device="cpu")
    strategy = HarmonyStrategy(microbatch_size=4, one_layer_per_pack=True, cluster=cluster_of(2))
    trainer(strategy, precision="bf16-mixed").fit(module, data)
    assert all(pack.narrow for pack in strategy.plan.packs)
    on_host = [span for span in strategy.timeline().spans if span.device == HOST and span.nbytes > 2**20]
    last_steps = [span for span in on_host if span.start > strategy.timeline().seconds / 2]
    assert {span.name for span in last_steps if "host-worker" in span.lane} == {"update"}
    narrow = sum(weight.nbytes for weight in module.parameters() if weight.dim() == 2)
    assert sum(span.nbytes for span in last_steps if "swap-in" in span.lane) > narrow
