"""The plan: every decision about a run, readable and writable by hand.

The runtime carries a plan out and decides nothing that stands here. Vocabulary is that of Li et al., "Harmony", VLDB 2022,
section 4: packs of consecutive layers, and where they meet microbatches (`plan.placement`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.plan.offsets import Lifetime, lay_at_offsets
from harmony_lightning.plan.placement import Placement
from harmony_lightning.plan.slots import SwapIns, swap_ins
from harmony_lightning.record import Record

Urgency = Literal["first", "next", "last"]
"""Of updates on the host: see `Plan.urgency`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack(Record):
    """Consecutive layers that are swapped in and out together."""

    layers: tuple[str, ...]
    """Names of the modules, in the order in which they are called."""
    parameters: tuple[str, ...]
    """Names of all their parameters, each once."""
    nbytes: int
    """Bytes of the weights as they travel."""
    trainable_nbytes: int
    """Bytes of the gradients, each as large as its master on the host."""
    slot_nbytes: int
    """Bytes of the weights as they lie on a device, alignment included."""
    gradient_slot_nbytes: int
    """Bytes of the gradients as they lie on a device, alignment included."""
    narrow: tuple[str, ...] = ()
    """Names of the narrow weights: float32 on the host, `Plan.narrow_dtype` on the way and on devices. If a device updates
    the pack, their masters go there with what the optimizer remembers."""
    narrow_trainable_nbytes: int = 0
    """Bytes of the gradients of narrow weights, in float32; those that travel in `Plan.narrow_dtype` are half of that."""
    update: Literal["host", "device"] = "host"
    """Where the optimizer steps the weights: on the host, where gradients go to it, or on the device that has the
    gradients, where what it remembers of the weights goes in, and leaves again with the weights."""
    state_nbytes: int = 0
    """Bytes of the tensors that the optimizer remembers of the weights, as far as they go to the device; 0 for host."""
    state_slot_nbytes: int = 0
    """The same as they lie in an arena, alignment included."""

    @property
    def master_nbytes(self) -> int:
        """Bytes of masters that go to the device that updates the pack, where it has narrow weights only."""
        return self.narrow_trainable_nbytes if self.update == "device" else 0

    @property
    def trained_nbytes(self) -> int:
        """Bytes of those weights that train, as they travel."""
        return self.trainable_nbytes - self.narrow_trainable_nbytes // 2

    def __post_init__(self) -> None:
        if self.update not in ("host", "device"):
            raise ConfigurationError(f"update must be 'host' or 'device', got {self.update!r}")
        if not 0 <= self.state_nbytes <= self.state_slot_nbytes:
            raise ConfigurationError(
                f"{self.state_nbytes} bytes of optimizer states cannot lie in {self.state_slot_nbytes}; 0 is the least"
            )

    @property
    def update_slot_nbytes(self) -> int:
        """Bytes that a device needs beside weights and gradients to update the pack: new weights, and states."""
        return self.gradient_slot_nbytes + self.state_slot_nbytes if self.update == "device" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Placement, Record):
    """What runs where, in which portions, and what waits where meanwhile."""

    mode: Literal["pp", "dp"]
    num_devices: int
    memory_bytes: int
    """What each device offers, bytes."""
    microbatch_size: int
    """Samples per microbatch; the last one of a minibatch may be smaller."""
    num_microbatches: int
    """Microbatches of the minibatch that the plan was made for."""
    packs: tuple[Pack, ...]
    """In forward order; forward and backward of the last one meet (fused). They are the same both ways, though Harmony's
    schedules (`plan.schedule`) have larger ones forward: autograd differentiates a layer on the device of its forward, and
    as each layer is recomputed by itself, all that a pack needs more in backward is memory for its gradients. Other packs
    forward would save 0 to 3 % of a step in pp; a dealt last pack makes up for most of that
    (`benchmarks/published_schedules`)."""
    stash: Literal["device", "host"]
    """Where inputs of layers wait from forward to backward, but for packs in `stash_stays`."""
    prefetch: int
    """Packs that are swapped in ahead of the running one, per device: 0 or 1."""
    updates_stay: tuple[int, ...] = ()
    """Packs whose states, and new weights if no other device needs them, stay on the device that has updated them, until
    somebody looks at them on the host."""
    microbatches_per_forward: int = 1
    """Microbatches that go through a layer's forward in one call, where it treats samples independently: Harmony's
    U_fwd / U_bwd. Not in the last pack, whose backward is next."""
    resident: tuple[int, ...] = ()
    """Packs with slots of their own: their weights stay where they are until somebody writes the masters."""
    stash_stays: tuple[int, ...] = ()
    """Packs whose stash waits on the device."""
    keep: tuple[str, ...] = ()
    """Layers that keep their activations until their backward instead of making them again."""
    peak_bytes: tuple[int, ...] = ()
    """The most that each device will hold at once in a step like the measured one; empty if nothing was measured."""
    narrow_dtype: Literal["bfloat16", "float16"] | None = None
    """What narrow weights are cast to: the type of autocast."""
    gradient_wire: Literal["exact", "half"] = "exact"
    """How gradients of narrow weights travel: `HarmonyConfig.gradient_wire`."""
    pipelines: int = 1
    """Of a plan in pp: so many side by side, each over as many devices, over which microbatches are dealt (pp x dp). A
    pack's weights go to one device of each, and its gradients are added up over these, in the order of pipelines."""
    dealt: tuple[int, ...] = ()
    """Packs of a plan in pp whose microbatches are dealt over the devices, as those of all packs are in dp: for one that
    takes longer than its neighbours, which would wait for it. Its weights go to each device."""
    dealt_order: tuple[int, ...] = ()
    """Devices to which microbatches of dealt packs go, one after the other, and again from the first on. Empty: all of
    them, beginning with the one whose turn it is."""

    def __post_init__(self) -> None:
        self.check_placement()
        if self.stash not in ("device", "host"):
            raise ConfigurationError(f"stash must be 'device' or 'host', got {self.stash!r}")
        if self.prefetch not in (0, 1):
            raise ConfigurationError(f"prefetch must be 0 or 1, got {self.prefetch!r}")
        for name in ("memory_bytes", "microbatch_size", "num_microbatches", "microbatches_per_forward"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.packs:
            raise ConfigurationError("a plan needs at least one pack")
        if self.narrow_dtype not in (None, "bfloat16", "float16"):
            raise ConfigurationError(f"narrow_dtype must be 'bfloat16', 'float16' or None, got {self.narrow_dtype!r}")
        if self.gradient_wire not in ("exact", "half"):
            raise ConfigurationError(f"gradient_wire must be 'exact' or 'half', got {self.gradient_wire!r}")
        if self.narrow_dtype is None and any(pack.narrow for pack in self.packs):
            raise ConfigurationError("a plan with narrow weights needs a narrow_dtype: 'bfloat16' or 'float16'")
        for index in self.updates_stay:
            if not 0 <= index < len(self.packs) or self.packs[index].update != "device":
                raise ConfigurationError(f"updates_stay names pack {index}, which is not updated on a device")
        layers = {name for pack in self.packs for name in pack.layers}
        for name in self.keep:
            if name not in layers:
                raise ConfigurationError(f"keep names layer {name!r}, which is in no pack")
        for field in ("resident", "stash_stays", "dealt"):
            for index in getattr(self, field):
                if not 0 <= index < len(self.packs):
                    raise ConfigurationError(f"{field} names pack {index}, but packs are 0 to {len(self.packs) - 1}")

    def follows(self, order: Sequence[str], loops: Sequence[frozenset[str]]) -> bool:
        """Whether packs are in the order of these calls, and layers that take turns share one."""
        called = set(order)
        pack_of = {layer: index for index, pack in enumerate(self.packs) for layer in pack.layers}
        planned = [layer for pack in self.packs for layer in pack.layers if layer in called]
        return planned == list(order) and all(len({pack_of[layer] for layer in loop}) == 1 for loop in loops)

    @property
    def num_active_devices(self) -> int:
        """Devices that get any work in one step."""
        return len({device for pack in range(len(self.packs)) for device in self.visitors(pack)})

    def visitors(self, pack: int) -> tuple[int, ...]:
        """Devices that a pack visits in one step, in the order of the microbatches that they get first."""
        return tuple(dict.fromkeys(self.device(pack, m) for m in range(self.num_microbatches)))

    def has_backward(self, pack: int) -> bool:
        """Whether gradients go through a pack: it trains, or one before it does. Weights outside layers do not count."""
        return any(other.trainable_nbytes for other in self.packs[: pack + 1])

    @property
    def swap_in_bytes_per_step(self) -> int:
        """Bytes of weights, and of what updates on devices need, that one step must bring in when every pack is called once
        and all that train are updated; the first step brings frozen ones, too, that later steps find (`slots.swap_ins`)."""
        return self.swap_in_bytes(is_first=False) + sum(
            pack.state_nbytes + pack.master_nbytes for i, pack in enumerate(self.packs) if i not in self.updates_stay
        )

    def swap_in_bytes(self, *, is_first: bool) -> int:
        """Bytes of weights in the first step, or in those behind it."""
        total, found = 0, set[int]()
        for first, later in map(self._swap_ins, range(self.num_devices)):
            brought = first if is_first else later
            frozen = sum(self.packs[i].nbytes - self.packs[i].trained_nbytes for i in brought.whole)
            trained = [i for i in (*brought.whole, *brought.trained) if not self.weights_stay(i)]
            total += frozen + sum(self.packs[i].trained_nbytes for i in trained)
            found.update(i for i in trained if self.is_left(i) and not is_first)  # by forward, not by backward
        return total - sum(self.packs[i].trained_nbytes for i in found)

    def _swap_ins(self, device: int) -> tuple[SwapIns, SwapIns]:
        """What a device brings in: in the first step, and in each one behind it."""
        packs = [index for index in self.packs_on(device) if device in self.visitors(index)]
        visits = [*packs, *(index for index in reversed(packs) if self.has_backward(index))]
        offsets = self.slot_offsets(device).items()
        return swap_ins(visits, {index: (offset, offset + self.packs[index].slot_nbytes) for index, offset in offsets})

    @property
    def swap_out_bytes_per_step(self) -> int:
        """Bytes that one step must bring out: gradients of packs that the host updates, weights and states of the others,
        each once, as devices add up what several of them have, and none of frozen weights. Gradients of narrow weights
        leave as they are made where there is only one microbatch to make them: a sum of several needs float32."""
        total = 0
        for index, pack in enumerate(self.packs):
            if pack.update == "device":
                total += 0 if self.weights_stay(index) else pack.trainable_nbytes
                total += 0 if index in self.updates_stay else pack.state_nbytes
                continue
            is_half = self.gradient_wire == "half" or self.num_microbatches == 1
            total += pack.trainable_nbytes - is_half * pack.narrow_trainable_nbytes // 2
        return total

    def weights_stay(self, pack: int) -> bool:
        """Whether new weights of a pack stay on the only device that ever needs them."""
        return pack in self.updates_stay and len(self.devices_of(pack)) == 1

    def is_left(self, pack: int) -> bool:
        """Whether the next forward finds new weights of a pack, which leave, where they were updated: no other pack has
        come there since, and no other device needs them."""
        if self.packs[pack].update == "host" or pack in self.updates_stay or len(self.devices_of(pack)) > 1:
            return False
        device = self.update_device(pack)
        return pack in self._updated_in_turn(device)[: self.num_shared_update_slots(device)]

    @property
    def num_gradient_buffers(self) -> int:
        """Packs whose gradients may be on the host, on their way to it, or waiting to leave, at once: enough that no device
        waits for an update that keeps up with it, and that a third of the updates may go on in the next forward."""
        return sum(self.gradient_buffers.values())

    @property
    def gradient_buffers(self) -> dict[Urgency, int]:
        """The same by urgency: no gradient waits for one of another kind to make room."""
        return {"first": self.num_devices, "next": self.num_devices + 3, "last": len(self.packs) // 3}

    def urgency(self, pack: int) -> Urgency:
        """Of a pack's update on the host. The next forward begins with the first pack of each device. While it goes on, for
        about a quarter of a step, no gradients come: a third of the updates, evenly spread, may wait that long, and go on
        as it comes to their packs."""
        if pack < self.num_devices:
            return "first"
        return "last" if pack % 3 == 2 else "next"

    def update_priority(self, pack: int) -> int:
        """Which of the updates that could go on comes first: the lowest. Those that are next go in the order in which their
        gradients arrive, as others wait to take the place of these."""
        return {"first": pack - len(self.packs), "next": 0, "last": 1 + pack}[self.urgency(pack)]

    def packs_on(self, device: int) -> tuple[int, ...]:
        """Packs that may visit a device, ascending, however many microbatches there are."""
        return tuple(pack for pack in range(len(self.packs)) if device in self.devices_of(pack))

    def rotating(self, device: int) -> tuple[int, ...]:
        """Packs whose slots share memory on a device: all but the resident ones."""
        return tuple(index for index in self.packs_on(device) if index not in self.resident)

    def slot_offsets(self, device: int) -> dict[int, int]:
        """Where the slots of rotating packs begin in the memory that these share. A pack is there from the visit before its
        own, if it is prefetched, to the end of its own; in backward the same packs meet, in reverse."""
        return self._in_turn({index: self.packs[index].slot_nbytes for index in self.rotating(device)})

    def shared_slots_nbytes(self, device: int) -> int:
        """Bytes of that memory."""
        offsets = self.slot_offsets(device).items()
        return max((offset + self.packs[index].slot_nbytes for index, offset in offsets), default=0)

    def gradient_offsets(self, device: int) -> dict[int, int]:
        """The same for gradients of packs that train: one's leave while those of the next are made."""
        sizes = {index: self.packs[index].gradient_slot_nbytes for index in self.packs_on(device)}
        return self._in_turn({index: nbytes for index, nbytes in sizes.items() if nbytes})

    def gradient_slots_nbytes(self, device: int) -> int:
        """Bytes that the slots for gradients take on a device."""
        offsets = self.gradient_offsets(device).items()
        return max((offset + self.packs[index].gradient_slot_nbytes for index, offset in offsets), default=0)

    def _in_turn(self, sizes: dict[int, int]) -> dict[int, int]:
        """Offsets for packs that come one after the other, each while the one before is there."""
        lifetimes = (Lifetime(turn, turn + 1 + self.prefetch, nbytes) for turn, nbytes in enumerate(sizes.values()))
        return dict(zip(sizes, lay_at_offsets(tuple(lifetimes)), strict=True))

    def slots_nbytes(self, device: int) -> int:
        """Bytes that all slots for weights take on a device."""
        own = sum(self.packs[index].slot_nbytes for index in self.packs_on(device) if index in self.resident)
        return own + self.shared_slots_nbytes(device)

    def arena_nbytes(self) -> int:
        """Bytes that the slots for weights, gradients and updates take on the device that has most of them."""
        devices = range(self.num_devices)
        return max(self.slots_nbytes(d) + self.gradient_slots_nbytes(d) for d in devices) + self.updates_nbytes

    @property
    def updates_nbytes(self) -> int:
        """Bytes of slots for updates alone."""
        return max(map(self.update_slots_nbytes, range(self.num_devices)))

    def update_device(self, pack: int) -> int:
        """The device that updates a pack, if one does: the first that has gradients of it."""
        return self.visitors(pack)[0]

    def _updated_in_turn(self, device: int) -> list[int]:
        """Packs that are updated there and do not stay, ascending."""
        indices = (i for i, pack in enumerate(self.packs) if pack.update == "device" and i not in self.updates_stay)
        return [index for index in indices if self.update_device(index) == device]

    def shared_update_slot_nbytes(self, device: int) -> int:
        """Bytes of each slot in which packs that do not stay are updated, one after the other."""
        return max((self.packs[index].update_slot_nbytes for index in self._updated_in_turn(device)), default=0)

    def num_shared_update_slots(self, device: int) -> int:
        """As many as there are for weights, and not more than there are packs for them."""
        return min(1 + self.prefetch, len(self._updated_in_turn(device)))

    def update_slots_nbytes(self, device: int) -> int:
        """Bytes that the slots for updates take on a device: one for each pack that stays, and those that others share."""
        own = sum(self.packs[i].update_slot_nbytes for i in self.updates_stay if self.update_device(i) == device)
        return own + self.num_shared_update_slots(device) * self.shared_update_slot_nbytes(device)
