"""Every error that this package raises on purpose.

    HarmonyError
    |-- ConfigurationError      a knob or a plan that cannot work; raised before the first step
    |-- CapacityError           a layer or a pack that cannot fit; raised before the first step
    |-- DeviceOutOfMemoryError  an allocation on a device that went over its limit
    |-- RaceError               an access to memory that is not ordered behind one it depends on; emulated GPUs only
    `-- UnsupportedError        user code that cannot be run layer-major, with the way out

Each message tells what failed, the values, and the remedy. Errors of the user's own code are never replaced: they keep
their type and traceback, and get a note that names layer, pack, microbatch and device.
"""


class HarmonyError(Exception):
    """The root: `except HarmonyError` catches what this package raises on purpose and nothing else."""


class ConfigurationError(HarmonyError, ValueError):
    """A knob, a plan or an environment that cannot work."""


class CapacityError(HarmonyError, RuntimeError):
    """The model cannot be trained under the memory limit, known before the first step."""


class DeviceOutOfMemoryError(HarmonyError, RuntimeError):
    """A device refused an allocation. The text holds "CUDA" and "out of memory", by which tools know such an error."""


class RaceError(HarmonyError, RuntimeError):
    """An access to memory that nothing orders behind an earlier one. On a real GPU the result would depend on timing."""


class UnsupportedError(HarmonyError, RuntimeError):
    """User code that the layer-major runtime cannot run correctly."""


def in_one_line(error: BaseException) -> str:
    """What an error says: its first line, and more where that only begins to print a module, or a list."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first, others = lines[0].strip(), lines[1:]
    if first.endswith(("(", "[", "{")):
        closing = next((line for line in others if not line[0].isspace()), None)
        return first if closing is None else f"{first}...{closing.rstrip()}"
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first
