"""The plan: every decision about a run, readable and writable by hand.

The runtime carries a plan out and decides nothing that stands here. Vocabulary and placement are those of Li et al.,
"Harmony", VLDB 2022, section 4: packs of consecutive layers, dealt round-robin over the GPUs (*pp*, wrap-around), or
microbatches dealt round-robin while every GPU runs every pack (*dp*).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harmony_lightning.errors import ConfigurationError
from harmony_lightning.record import Record

ALIGNMENT = 64
"""Bytes: start of every weight in an arena. The host allocator's own, so kernels see the alignment they are used to."""


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack(Record):
    """Consecutive layers that are swapped in and out together."""

    layers: tuple[str, ...]
    """Names of the modules, in the order in which they are called."""
    parameters: tuple[str, ...]
    """Names of all their parameters, each once, in arena order."""
    nbytes: int
    """Bytes of the weights."""
    trainable_nbytes: int
    """Bytes of those weights that get a gradient."""
    slot_nbytes: int
    """Bytes of the weights as they lie in an arena, alignment included."""
    gradient_slot_nbytes: int
    """Bytes of the gradients as they lie in an arena, alignment included."""
    update: Literal["host", "device"] = "host"
    """Where the optimizer steps the weights: on the host, where gradients go to it, or on the device that has the
    gradients, where what it remembers of the weights goes in, and leaves again with the weights."""
    state_nbytes: int = 0
    """Bytes of the tensors that the optimizer remembers of the weights, as far as they go to the device; 0 for host."""
    state_slot_nbytes: int = 0
    """The same as they lie in an arena, alignment included."""

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
class Plan(Record):
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
    """In forward order; forward and backward of the last one meet (fused)."""
    stash: Literal["device", "host"]
    """Where inputs of layers wait from forward to backward."""
    prefetch: int
    """Packs that are swapped in ahead of the running one, per device: 0 or 1."""
    updates_stay: tuple[int, ...] = ()
    """Packs whose states, and new weights if no other device needs them, stay on the device that has updated them, until
    somebody looks at them on the host."""
    microbatches_per_forward: int = 1
    """Microbatches that go through a layer's forward in one call, where it treats samples independently: Harmony's
    U_fwd / U_bwd. Not in the last pack, whose backward is next."""
    keep: tuple[str, ...] = ()
    """Layers of the last pack that keep their activations until their backward, which is next, instead of making them
    again."""

    def __post_init__(self) -> None:
        if self.mode not in ("pp", "dp"):
            raise ConfigurationError(f"mode must be 'pp' or 'dp', got {self.mode!r}")
        if self.stash not in ("device", "host"):
            raise ConfigurationError(f"stash must be 'device' or 'host', got {self.stash!r}")
        if self.prefetch not in (0, 1):
            raise ConfigurationError(f"prefetch must be 0 or 1, got {self.prefetch!r}")
        for name in ("num_devices", "memory_bytes", "microbatch_size", "num_microbatches", "microbatches_per_forward"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.packs:
            raise ConfigurationError("a plan needs at least one pack")
        for index in self.updates_stay:
            if not 0 <= index < len(self.packs) or self.packs[index].update != "device":
                raise ConfigurationError(f"updates_stay names pack {index}, which is not updated on a device")
        for name in self.keep:
            if name not in self.packs[-1].layers:
                raise ConfigurationError(
                    f"only layers of the last pack can keep their activations, {name!r} is not in it"
                )

    def device(self, pack: int, microbatch: int) -> int:
        """The placement: index of the device on which this microbatch goes through this pack, forward and backward."""
        return (pack if self.mode == "pp" else microbatch) % self.num_devices

    def follows(self, order: Sequence[str], loops: Sequence[frozenset[str]]) -> bool:
        """Whether packs are in the order of these calls, and layers that take turns share one."""
        called = set(order)
        pack_of = {layer: index for index, pack in enumerate(self.packs) for layer in pack.layers}
        planned = [layer for pack in self.packs for layer in pack.layers if layer in called]
        return planned == list(order) and all(len({pack_of[layer] for layer in loop}) == 1 for loop in loops)

    @property
    def num_active_devices(self) -> int:
        """Devices that get any work in one step."""
        return min(self.num_devices, len(self.packs) if self.mode == "pp" else self.num_microbatches)

    def visitors(self, pack: int) -> tuple[int, ...]:
        """Devices that a pack visits in one step, ascending."""
        return tuple(sorted({self.device(pack, m) for m in range(self.num_microbatches)}))

    def has_backward(self, pack: int) -> bool:
        """Whether gradients go through a pack: it trains, or one before it does. Weights outside layers do not count."""
        return any(other.trainable_nbytes for other in self.packs[: pack + 1])

    @property
    def swap_in_bytes_per_step(self) -> int:
        """Bytes of weights, and of states of the optimizer, that one step must bring in when every pack is called once.

        Weights once for each pack and visited device, and once more for each that has a backward, less the packs at which
        forward and backward meet: the last pack on each device is still there when its backward begins.
        """
        total = self._state_bytes
        for index, pack in enumerate(self.packs):
            nbytes = pack.nbytes - (pack.trainable_nbytes if self.weights_stay(index) else 0)
            for device in self.visitors(index):
                is_last = not any(device in self.visitors(later) for later in range(index + 1, len(self.packs)))
                total += nbytes * (1 if is_last or not self.has_backward(index) else 2)
        return total

    @property
    def swap_out_bytes_per_step(self) -> int:
        """Bytes that one step must bring out: gradients of packs that the host updates, weights and states of the others,
        each once, none of frozen weights."""
        leaving = (pack for index, pack in enumerate(self.packs) if not self.weights_stay(index))
        return sum(pack.trainable_nbytes for pack in leaving) + self._state_bytes

    @property
    def _state_bytes(self) -> int:
        return sum(pack.state_nbytes for index, pack in enumerate(self.packs) if index not in self.updates_stay)

    def weights_stay(self, pack: int) -> bool:
        """Whether new weights of a pack stay on the only device that needs them."""
        return pack in self.updates_stay and len(self.visitors(pack)) == 1

    @property
    def num_gradient_buffers(self) -> int:
        """Packs whose gradients may be on the host, on their way to it, or waiting to leave, at once: enough that no device
        waits for an update that keeps up with it."""
        return self.num_active_devices + 3 + len(self.packs) // 4

    def update_priority(self, pack: int) -> int:
        """Which of the updates that could go on comes first: the lowest. The next forward wants the first pack first, but
        gradients that others wait to take the place of go in the order of their arrival."""
        return 0 if pack >= self.num_gradient_buffers else 1 + pack

    def arena_nbytes(self) -> int:
        """Bytes that the slots for weights, gradients and updates take on the device that has most of them."""
        per_slot = max(pack.slot_nbytes for pack in self.packs)
        per_gradient_slot = max(pack.gradient_slot_nbytes for pack in self.packs)
        return (1 + self.prefetch) * (per_slot + per_gradient_slot) + self.updates_nbytes

    @property
    def updates_nbytes(self) -> int:
        """Bytes of slots for updates alone."""
        return max(map(self.update_slots_nbytes, range(self.num_devices)))

    def update_device(self, pack: int) -> int:
        """The device that updates a pack, if one does: the first that has gradients of it."""
        return self.visitors(pack)[0]

    @property
    def shared_update_slot_nbytes(self) -> int:
        """Bytes of each slot in which packs that do not stay are updated, one after the other."""
        shared = (pack.update_slot_nbytes for index, pack in enumerate(self.packs) if index not in self.updates_stay)
        return max(shared, default=0)

    def update_slots_nbytes(self, device: int) -> int:
        """Bytes that the slots for updates take on a device: one for each pack that stays, and as many for all others as
        there are for weights."""
        here = [index for index in range(len(self.packs)) if self.update_device(index) == device]
        own = sum(self.packs[index].update_slot_nbytes for index in here if index in self.updates_stay)
        is_shared = any(self.packs[i].update == "device" and i not in self.updates_stay for i in here)
        return own + is_shared * (1 + self.prefetch) * self.shared_update_slot_nbytes
