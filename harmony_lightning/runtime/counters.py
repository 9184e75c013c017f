"""Running counts of one engine; `observability.Statistics` is the frozen picture that users see."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Exact payload bytes and counts since the engine was made."""

    steps: int = 0
    num_microbatches: int = 0
    swap_in_bytes: int = 0
    swap_out_bytes: int = 0
    p2p_bytes: int = 0
    stash_in_bytes: int = 0
    stash_out_bytes: int = 0
    unplaced_stashes: int = 0
    input_bytes: int = 0
    joint_forwards: int = 0
    out_of_turn: int = 0
    short_of_memory: int = 0
    updates_just_in_time: int = 0
    updates_whole: int = 0
    updates_on_devices: int = 0
