"""A run on emulated GPUs with a preset yields a timeline, the same one every time."""

import itertools
import json

import pytest
import torch
from chain import Chain, loader, trainer

from harmony_lightning import ConfigurationError, EmulatedCluster, HarmonyStrategy
from harmony_lightning.observability.trace import chrome_trace
from harmony_lightning.plan.timeline import HOST, Timeline


def timeline(preset="3090", **options):
    torch.manual_seed(0)
    cluster = EmulatedCluster(2, "200KiB", preset=preset)
    strategy = HarmonyStrategy(microbatch_size=2, cluster=cluster, **options)
    trainer(strategy).fit(Chain(depth=6), loader(8, 16))
    return strategy.timeline(), strategy.statistics()


def test_two_runs_have_equal_timelines_to_the_bit():
    (one, _), (other, _) = timeline(), timeline()
    assert one == other and one.seconds > 0


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
