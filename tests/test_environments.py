"""Where a run comes from: the command line, YAML, environment variables, a cluster, other accelerators."""

import lightning as L
import lightning.fabric
import lightning.pytorch
import pytest
import torch
import yaml
from chain import Chain, harmony, loader, same_weights, trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.accelerators import CPUAccelerator

from harmony_lightning import ConfigurationError, EmulatedCluster, HarmonyStrategy

QUIET = {
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader(8)


def reference(accumulate=1):
    torch.manual_seed(0)
    module = Chain()
    trainer(accumulate_grad_batches=accumulate).fit(module, loader(8 // accumulate))
    return module


@pytest.mark.parametrize("name", ["harmony", "Harmony"])
def test_the_strategy_is_named_by_an_environment_variable(monkeypatch, name):
    monkeypatch.setenv("PL_TRAINER_STRATEGY", name)
    monkeypatch.setenv("HARMONY_EMULATED_GPUS", "2")
    monkeypatch.setenv("HARMONY_MEMORY", "120KiB")
    monkeypatch.setenv("HARMONY_MICROBATCH_SIZE", "2")
    torch.manual_seed(0)
    module = Chain()
    fitted = L.Trainer(**QUIET)
    fitted.fit(module, loader(8))
    assert isinstance(fitted.strategy, HarmonyStrategy)
    assert fitted.strategy.statistics().num_microbatches == 4
    assert same_weights(module, reference(4))


def run_cli(*arguments):
    from lightning.pytorch.cli import LightningCLI

    torch.manual_seed(0)
    quiet = [f"--trainer.{name}={str(value).lower()}" for name, value in QUIET.items()]
    return LightningCLI(
        Chain, Data, args=["fit", *quiet, *arguments], seed_everything_default=0, save_config_callback=None
    )


@pytest.fixture
def _cli():
    pytest.importorskip("jsonargparse")


@pytest.mark.usefixtures("_cli")
def test_the_strategy_is_named_on_the_command_line(monkeypatch):
    monkeypatch.setenv("HARMONY_EMULATED_GPUS", "2")
    monkeypatch.setenv("HARMONY_MEMORY", "120KiB")
    monkeypatch.setenv("HARMONY_MICROBATCH_SIZE", "2")
    cli = run_cli("--trainer.strategy=harmony", "--model.depth=9")
    assert type(cli.trainer.strategy) is HarmonyStrategy
    assert cli.trainer.strategy.statistics().num_packs >= 4


@pytest.mark.usefixtures("_cli")
def test_the_strategy_is_written_in_yaml(tmp_path):
    strategy = {
        "class_path": "harmony_lightning.lightning.HarmonyStrategy",
        "init_args": {
            "mode": "pp",
            "microbatch_size": 2,
            "memory": "120KiB",
            "stash": "host",
            "layers": ["net.*"],
            "cluster": {
                "class_path": "harmony_lightning.EmulatedCluster",
                "init_args": {"num_gpus": 2, "memory": "120KiB"},
            },
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    cli = run_cli(f"--config={tmp_path / 'run.yaml'}")
    assert type(cli.trainer.strategy) is HarmonyStrategy
    assert cli.trainer.strategy.plan.num_devices == 2
    assert cli.trainer.strategy.statistics().num_microbatches == 4
    assert same_weights(cli.model, reference(4))


@pytest.mark.usefixtures("_cli")
def test_the_strategy_s_knobs_are_written_on_the_command_line(monkeypatch):
    monkeypatch.setenv("HARMONY_EMULATED_GPUS", "2")
    cli = run_cli(
        "--trainer.strategy=harmony_lightning.HarmonyStrategy",
        "--trainer.strategy.memory=120KiB",
        "--trainer.strategy.microbatch_size=4",
    )
    assert cli.trainer.strategy.statistics().num_microbatches == 2
    assert cli.trainer.strategy.plan.memory_bytes == 120 << 10


TASKS = {
    "torchrun": {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "none",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1234",
    },
    "slurm": {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SRUN_DEBUG": "1",
    },
    "by hand": {"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "2"},
}


@pytest.mark.parametrize(
    "make", [lambda: "harmony", HarmonyStrategy, lambda: HarmonyStrategy(cluster=EmulatedCluster(2))]
)
@pytest.mark.parametrize("kind", TASKS)
def test_more_than_one_task_is_refused(monkeypatch, kind, make):
    for name, value in TASKS[kind].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=r"has started 2 tasks.*one process drives all GPUs.*--ntasks=1"):
        L.Trainer(strategy=make(), devices=2, **QUIET)


@pytest.mark.parametrize("kind", ["torchrun", "slurm"])
def test_one_task_of_a_cluster_is_all_right(monkeypatch, kind):
    for name, value in TASKS[kind].items():
        monkeypatch.setenv(name, "1" if value == "2" else value)
    module = Chain()
    fitted = L.Trainer(strategy="harmony", devices=1, **QUIET)
    fitted.fit(module, loader(8))
    assert not isinstance(fitted.strategy.cluster_environment, LightningEnvironment)
    assert fitted.global_step == 5


class Elsewhere(CPUAccelerator):
    """An accelerator whose devices are of another type."""

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("mps", 0)]

    def setup_device(self, device):
        raise AssertionError("the device was touched")


def test_other_accelerators_are_refused():
    run = L.Trainer(strategy=HarmonyStrategy(), **{**QUIET, "accelerator": Elsewhere()})
    with pytest.raises(ConfigurationError, match="not on mps:0; pass accelerator='cpu' or 'cuda'"):
        run.fit(Chain(), loader(8))


class Scaled(torch.nn.Linear):
    """Was never meant for a GPU."""

    def forward(self, inputs):
        return super().forward(inputs * torch.arange(1.0, 1 + inputs.shape[1])) + self.weight.new_ones(1).numpy().item()


class OfTheHost(Chain):
    def __init__(self):
        super().__init__(depth=4)
        self.net[1] = Scaled(64, 64)
        self.net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] - torch.full((64,), 0.5),))


def test_layers_of_the_host_run_where_the_environment_says_that_gpus_are_emulated(monkeypatch):
    monkeypatch.setenv("HARMONY_EMULATED_GPUS", "2")
    monkeypatch.setenv("HARMONY_MEMORY", "120KiB")
    monkeypatch.setenv("HARMONY_MICROBATCH_SIZE", "8")
    fits = []
    for strategy in ("auto", "harmony"):
        torch.manual_seed(0)
        fits.append(OfTheHost())
        trainer(strategy).fit(fits[-1], loader(8))
    assert same_weights(*fits)
    with pytest.raises(RuntimeError, match="same device"):
        trainer(harmony(2)).fit(fits[-1], loader(8))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_gpus_are_emulated_where_there_are_real_ones_too(monkeypatch, precision):
    for package in (lightning.fabric, lightning.pytorch):
        monkeypatch.setattr(package.accelerators.cuda, "num_cuda_devices", lambda: 2)
    run = L.Trainer(strategy=harmony(2, microbatch_size=8), precision=precision, **{**QUIET, "accelerator": "auto"})
    assert not isinstance(run.accelerator, CPUAccelerator)
    torch.manual_seed(0)
    module = Chain()
    run.fit(module, loader(8))
    assert isinstance(run.accelerator, CPUAccelerator) and run.global_step == 5
    assert same_weights(module, reference()) == (precision == "32-true")


def test_several_servers_are_refused():
    with pytest.raises(ConfigurationError, match="one server, got num_nodes=2"):
        L.Trainer(strategy=HarmonyStrategy(), num_nodes=2, **QUIET)
