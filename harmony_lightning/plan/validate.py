"""Whether a plan, perhaps written by hand, fits a module and a cluster."""

from collections import Counter

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.errors import ConfigurationError
from harmony_lightning.plan.plan import Plan
from harmony_lightning.units import format_nbytes


def check_plan(plan: Plan, decomposition: Decomposition, num_devices: int) -> None:
    """Raises ConfigurationError, naming the pack and the layer, if the plan cannot be carried out."""
    if plan.num_devices != num_devices:
        raise ConfigurationError(f"the plan is for {plan.num_devices} devices, the cluster has {num_devices}")
    weights = {layer.name: layer.weights for layer in decomposition.layers}
    planned = Counter(name for pack in plan.packs for name in pack.layers)
    for name in (*planned, *weights):
        if name not in weights:
            raise ConfigurationError(f"the plan names layer {name!r}, which this module does not have")
        if planned[name] != 1:
            raise ConfigurationError(f"the plan must have layer {name!r} in one pack, it has it in {planned[name]}")
    nbytes = {weight.name: weight.nbytes for weight in decomposition.weights}
    for index, pack in enumerate(plan.packs):
        expected = {weight for name in pack.layers for weight in weights[name]}
        if set(pack.parameters) != expected or len(pack.parameters) != len(expected):
            odd = sorted(expected.symmetric_difference(pack.parameters)) or ["(one twice)"]
            raise ConfigurationError(f"pack {index} must have the weights of its layers, once each; look at {odd[0]}")
        if odd := sorted(set(pack.narrow) - expected):
            raise ConfigurationError(f"pack {index} says that weight {odd[0]} is narrow, which none of its layers has")
        total = sum(nbytes[name] // (2 if name in pack.narrow else 1) for name in expected)
        if pack.nbytes != total:
            raise ConfigurationError(f"pack {index} says {pack.nbytes} bytes of weights, its layers have {total}")
    if plan.resident and plan.arena_nbytes() > plan.memory_bytes:
        raise ConfigurationError(
            f"slots for weights and gradients take {format_nbytes(plan.arena_nbytes())} of a device, which offers "
            f"{format_nbytes(plan.memory_bytes)}; let fewer packs be resident than {len(plan.resident)}"
        )
