"""What searches find."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harmony_lightning.plan.schedule import Schedule
from harmony_lightning.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Record):
    """A schedule and what it takes."""

    schedule: Schedule
    seconds: float
    peak_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Record):
    """What a search found, and how far it had to look."""

    rules: str
    best: Candidate
    others: tuple[Candidate, ...]
    """The next best of those that were simulated: one for each combination of sizes and numbers of packs, best first."""
    num_schedules: int
    """Members of the family that may fit."""
    num_simulated: int
    is_proved: bool
    """Whether nothing in the family is better; False if the search ran into its limit on simulations."""
    search_seconds: float


def best_of_kinds(found: Sequence[Candidate]) -> Iterator[Candidate]:
    """One for each combination of placement, size and number of packs, best first."""
    kinds: dict[tuple[object, ...], Candidate] = {}
    for candidate in found:
        schedule = candidate.schedule
        placement, num_packs = (schedule.num_copies, schedule.dealt), len(schedule.packs_backward)
        kinds.setdefault((placement, schedule.microbatch_backward, num_packs), candidate)
    yield from kinds.values()


def num_runtime_computations(schedule: Schedule) -> int:
    """Microbatches times packs, there and back: what a simulation under the runtime's rules takes time for."""
    num_packs = len(schedule.packs_forward) + len(schedule.packs_backward)
    return num_packs * -(-schedule.minibatch // schedule.microbatch_backward)


def num_computations(schedule: Schedule) -> int:
    """The same under other rules, by which one device stands for all in dp."""
    forward = len(schedule.packs_forward) * len(schedule.sizes_forward)
    return forward + len(schedule.packs_backward) * len(schedule.sizes_backward)
