"""A plan for a module of which other weights train than when it was made: some were thawed, or frozen, since."""

from dataclasses import replace

from harmony_lightning.decomposer.decomposition import Decomposition
from harmony_lightning.plan.offsets import aligned
from harmony_lightning.plan.plan import Pack, Plan


def refit(plan: Plan, decomposition: Decomposition) -> Plan:
    """The same packs with slots for the gradients of what trains in them. Of a pack where that is something else, the plan
    does not know what the optimizer remembers: it is updated on the host."""
    trained = {weight.name: weight.nbytes for weight in decomposition.weights if weight.is_trainable}
    packs = tuple(_refit(pack, trained) for pack in plan.packs)
    if packs == plan.packs:
        return plan
    updates_stay = tuple(index for index in plan.updates_stay if packs[index].update == "device")
    return replace(plan, packs=packs, updates_stay=updates_stay, peak_bytes=())


def _refit(pack: Pack, trained: dict[str, int]) -> Pack:
    sizes = {name: trained[name] for name in pack.parameters if name in trained}
    refitted = replace(
        pack,
        trainable_nbytes=sum(sizes.values()),
        gradient_slot_nbytes=sum(map(aligned, sizes.values())),
        narrow_trainable_nbytes=sum(nbytes for name, nbytes in sizes.items() if name in pack.narrow),
    )
    return pack if refitted == pack else replace(refitted, update="host", state_nbytes=0, state_slot_nbytes=0)
