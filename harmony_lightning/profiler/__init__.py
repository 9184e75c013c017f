"""The profiler room: what each layer costs, and what the machine offers. No torch in the records."""

from harmony_lightning.profiler.machine import Machine, read_machine
from harmony_lightning.profiler.profile import LayerKind, MicrobatchSizes, Profile, at_size, read_profile

__all__ = [
    "LayerKind",
    "Machine",
    "MicrobatchSizes",
    "Profile",
    "at_size",
    "read_machine",
    "read_profile",
]
