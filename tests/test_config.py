import logging

import pytest
from torch import nn

from harmony_lightning import ConfigurationError, EmulatedCluster, HarmonyConfig, HarmonyStrategy
from harmony_lightning.config import Environment


def test_defaults_leave_everything_to_the_plan():
    config = HarmonyConfig()
    assert (config.mode, config.microbatch_size, config.memory, config.stash) == ("auto",) * 4
    assert config.memory_bytes is None
    assert config.layers == ()
    assert config.split_batch is None


@pytest.mark.parametrize("memory", ["11GiB", 11 << 30])
def test_memory_is_a_size(memory):
    assert HarmonyConfig(memory=memory).memory_bytes == 11 << 30


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mode": "tp"}, r"mode must be 'auto', 'pp', 'dp' or 'mixed', got 'tp'"),
        ({"stash": "disk"}, r"stash must be 'auto', 'device' or 'host', got 'disk'"),
        ({"update": "gpu"}, r"update must be 'auto', 'host', 'device' or 'first', got 'gpu'"),
        ({"pipelines": 0}, r"pipelines must be 'auto' or a positive integer, got 0"),
        ({"mode": "dp", "pipelines": 2}, r"pipelines are of pp and mixed, got 2 in mode 'dp'"),
        ({"microbatch_size": 0}, r"microbatch_size must be 'auto' or a positive integer, got 0"),
        ({"microbatch_size": -2}, r"got -2"),
        ({"microbatch_size": 2.0}, r"got 2\.0"),
        ({"microbatch_size": "2"}, r"got '2'"),
        ({"microbatch_size": True}, r"got True"),
        ({"planner": "swarm"}, r"planner must be 'bounds' or 'genetic', got 'swarm'"),
        ({"gradient_wire": "bf16"}, r"gradient_wire must be 'exact' or 'half', got 'bf16'"),
        ({"planner": "beam"}, r"planner must be 'bounds' or 'genetic', got 'beam'"),
        ({"evaluation_batches": 0}, r"evaluation_batches must be a positive integer, got 0"),
        ({"evaluation_batches": "auto"}, r"got 'auto'"),
        ({"memory": "lots"}, r"'lots' is not a memory size"),
        ({"memory": 0}, r"must be positive"),
        ({"layers": "net.*"}, r"layers must be a list, got 'net\.\*'; write layers=\['net\.\*'\]"),
        ({"layers": nn.Linear}, r"layers must be a list"),
        ({"split_batch": 4}, r"split_batch must be a function of \(batch, num_microbatches\), got 4"),
    ],
)
def test_impossible_values_are_refused_with_the_value(knobs, message):
    with pytest.raises(ConfigurationError, match=message):
        HarmonyConfig(**knobs)


def test_a_configuration_does_not_change():
    with pytest.raises(AttributeError):
        HarmonyConfig().mode = "dp"


def test_variables_are_read():
    environment = Environment.read(
        {
            "HARMONY_PLAN": "sizes",
            "HARMONY_MODE": "dp",
            "HARMONY_PIPELINES": "1",
            "HARMONY_MICROBATCH_SIZE": "3",
            "HARMONY_MEMORY": "1GiB",
            "HARMONY_STASH": "device",
            "HARMONY_UPDATE": "device",
            "HARMONY_PLANNER": "genetic",
            "HARMONY_EVALUATION_BATCHES": "5",
            "HARMONY_GRADIENT_WIRE": "half",
            "HARMONY_EMULATED_GPUS": "4",
            "MODE": "pp",
        }
    )
    assert environment.emulated_gpus == 4
    assert environment.knobs() == {
        "mode": "dp",
        "pipelines": 1,
        "microbatch_size": 3,
        "memory": "1GiB",
        "stash": "device",
        "update": "device",
        "planner": "genetic",
        "evaluation_batches": 5,
        "gradient_wire": "half",
    }


def test_an_empty_environment_sets_nothing():
    environment = Environment.read({})
    assert environment.emulated_gpus is None
    assert environment.knobs() == {}


def test_a_variable_may_say_auto():
    assert HarmonyConfig(**Environment.read({"HARMONY_MICROBATCH_SIZE": "auto"}).knobs()).microbatch_size == "auto"


@pytest.mark.parametrize("text", ["two", "-1", "1.5", ""])
def test_numbers_in_the_environment_are_numbers(text):
    with pytest.raises(ConfigurationError, match="HARMONY_EMULATED_GPUS must be a number of GPUs"):
        Environment.read({"HARMONY_EMULATED_GPUS": text})
    with pytest.raises(ConfigurationError, match="HARMONY_MICROBATCH_SIZE must be a number"):
        Environment.read({"HARMONY_MICROBATCH_SIZE": text}).knobs()
    with pytest.raises(ConfigurationError, match="HARMONY_EVALUATION_BATCHES must be a number"):
        Environment.read({"HARMONY_EVALUATION_BATCHES": text}).knobs()


def test_switches_and_levels_in_the_environment():
    environment = Environment.read({"HARMONY_ONE_LAYER_PER_PACK": "1", "HARMONY_LOG_LEVEL": "info"})
    assert environment.knobs() == {"one_layer_per_pack": True}
    assert environment.log_level == "INFO"
    assert Environment.read({"HARMONY_ONE_LAYER_PER_PACK": "0"}).knobs() == {"one_layer_per_pack": False}
    with pytest.raises(ConfigurationError, match="HARMONY_ONE_LAYER_PER_PACK must be 0 or 1, got 'yes'"):
        Environment.read({"HARMONY_ONE_LAYER_PER_PACK": "yes"})
    with pytest.raises(ConfigurationError, match="HARMONY_LOG_LEVEL must be a level such as INFO, got 'loud'"):
        Environment.read({"HARMONY_LOG_LEVEL": "loud"})


def test_a_plan_that_cannot_be_read_is_told(tmp_path):
    for plan, told in (("size", "No such file"), (tmp_path, "Is a directory"), (3, "got 3"), ({"mode": "pp"}, "got {")):
        with pytest.raises(
            ConfigurationError, match="plan must be a Plan, 'auto', 'packs', 'sizes' or a file"
        ) as caught:
            HarmonyStrategy(plan=plan)
        assert told in str(caught.value)
    (tmp_path / "plan.json").write_text("[1")
    with pytest.raises(ConfigurationError, match=r"plan\.json: this is no Plan in JSON"):
        HarmonyStrategy(plan=tmp_path / "plan.json")


def test_arguments_that_there_are_not_are_told_with_those_that_there_are():
    with pytest.raises(
        TypeError, match=r"HarmonyStrategy has no argument 'microbatches'; it has mode, pipelines, microb"
    ):
        HarmonyStrategy(microbatches=4)
    assert HarmonyStrategy(accelerator=None, checkpoint_io=None) is not None


@pytest.fixture
def package_log():
    package = logging.getLogger("harmony_lightning")
    before = package.level, list(package.handlers), package.propagate
    yield package
    package.setLevel(before[0])
    package.handlers[:] = before[1]
    package.propagate = before[2]


def test_a_log_level_is_told_to_the_package_once(monkeypatch, package_log):
    monkeypatch.setenv("HARMONY_LOG_LEVEL", "DEBUG")
    HarmonyStrategy()
    HarmonyStrategy()
    assert package_log.level == logging.DEBUG and len(package_log.handlers) == 1


@pytest.fixture
def variables(monkeypatch):
    for name, value in {"MODE": "dp", "MICROBATCH_SIZE": "3", "MEMORY": "2MiB", "STASH": "device"}.items():
        monkeypatch.setenv(f"HARMONY_{name}", value)
    return monkeypatch


def test_variables_reach_the_strategy(variables):
    config = HarmonyStrategy()._config
    assert (config.mode, config.microbatch_size, config.memory_bytes, config.stash) == ("dp", 3, 2 << 20, "device")


def test_arguments_in_code_count_more_each_for_itself(variables):
    config = HarmonyStrategy(mode="pp", memory="1MiB")._config
    assert (config.mode, config.microbatch_size, config.memory_bytes, config.stash) == ("pp", 3, 1 << 20, "device")
    config = HarmonyStrategy(mode="auto", microbatch_size="auto", memory="auto", stash="auto")._config
    assert (config.mode, config.microbatch_size, config.memory, config.stash) == ("auto",) * 4


def test_emulated_gpus_have_the_memory_of_the_environment(variables):
    variables.setenv("HARMONY_EMULATED_GPUS", "3")
    devices = HarmonyStrategy()._cluster().devices
    assert [(device.name, device.memory_bytes) for device in devices] == [(f"gpu{i}", 2 << 20) for i in range(3)]
    assert HarmonyStrategy(memory="1MiB")._cluster().devices[0].memory_bytes == 1 << 20


def test_a_cluster_in_code_counts_more_than_emulated_gpus(variables):
    variables.setenv("HARMONY_EMULATED_GPUS", "3")
    cluster = EmulatedCluster(1, "5MiB")
    assert HarmonyStrategy(cluster=cluster)._cluster() is cluster


def test_bad_variables_are_refused_when_the_strategy_is_made(variables):
    variables.setenv("HARMONY_MODE", "sideways")
    with pytest.raises(ConfigurationError, match="mode must be"):
        HarmonyStrategy()
    variables.setenv("HARMONY_MODE", "pp")
    variables.setenv("HARMONY_EMULATED_GPUS", "0")
    with pytest.raises(ConfigurationError, match="num_gpus must be"):
        HarmonyStrategy()


def test_a_cluster_is_an_emulated_one():
    with pytest.raises(ConfigurationError, match="cluster must be an EmulatedCluster, got 2"):
        HarmonyStrategy(cluster=2)


def test_layers_may_be_any_sequence_but_no_single_name():
    assert HarmonyStrategy(layers=["a", nn.Linear])._config.layers == ("a", nn.Linear)
