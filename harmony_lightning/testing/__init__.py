"""For tests, yours included: train small modules on emulated GPUs and compare with plain Lightning on one device.

report = compare_with_one_device(make_module, batches, microbatch_size=2, cluster=EmulatedCluster(4, "64KiB"))
assert report.is_equal, report

modules     `Step`: any `nn.Module` and a loss as a LightningModule
compare     `train_plain`, `train_harmony`, and what differs between two runs
streams     `plain_streams`: gives plain Lightning the random numbers that microbatches have
"""

from harmony_lightning.testing.compare import Comparison, Run, compare_with_one_device, train_harmony, train_plain
from harmony_lightning.testing.modules import Step, adamw, sgd
from harmony_lightning.testing.streams import plain_streams

__all__ = [
    "Comparison",
    "Run",
    "Step",
    "adamw",
    "compare_with_one_device",
    "plain_streams",
    "sgd",
    "train_harmony",
    "train_plain",
]
