"""A plan as a grid that people read: packs down, devices across, in each cell the microbatches that meet there.

    pack  layers    weights  gpu0     gpu1
       0  embed     1.2 MiB  0-3      .
>      1  blocks.0  512 KiB  .        [0-3]
       2  head      1.2 MiB  0-3      .
"""

from collections.abc import Sequence

from harmony_lightning.plan.plan import Plan
from harmony_lightning.units import format_nbytes

NUM_AROUND = 3
"""Rows before and behind the marked one that are shown; of a long plan nobody reads all."""
_MOST_CHARACTERS = 32
"""Of the names of a pack's layers."""


def grid(plan: Plan, pack: int, device: int | None = None) -> str:
    """Lines of text around a pack, which is marked: on one device, or on all that it visits."""
    first, last = max(0, pack - NUM_AROUND), min(len(plan.packs) - 1, pack + NUM_AROUND)
    rows = [("", "pack", "layers", "weights", *(f"gpu{d}" for d in range(plan.num_devices)))]
    for index in range(first, last + 1):
        one = plan.packs[index]
        cells = []
        for where in range(plan.num_devices):
            met = [m for m in range(plan.num_microbatches) if plan.device(index, m) == where]
            is_marked = index == pack and (where == device or (device is None and met))
            cells.append(f"[{_numbers(met)}]" if is_marked else _numbers(met))
        rows.append((">" * (index == pack), str(index), _short(one.layers), format_nbytes(one.nbytes), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    before = [f"   ... {first} before"] if first else []
    behind = [f"   ... {rest} behind"] if (rest := len(plan.packs) - 1 - last) else []
    return "\n".join([lines[0], *before, *lines[1:], *behind])


def _numbers(values: Sequence[int]) -> str:
    """ "0-3", "0,2,4", "1,5 ... 61", or "." for none."""
    if not values:
        return "."
    if len(values) > 1 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]}-{values[-1]}"
    return ",".join(map(str, values)) if len(values) <= 4 else f"{values[0]},{values[1]} ... {values[-1]}"


def _short(names: Sequence[str]) -> str:
    text = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}" if names else "(none)"
    return text if len(text) <= _MOST_CHARACTERS else f"...{text[3 - _MOST_CHARACTERS :]}"
