"""The scheduler room: from sizes or costs to a plan. No torch in here.

explain    why a step takes as long as it does, and what would help
search     the best schedule of a family, or the best that a genetic algorithm breeds
simulate   what one schedule takes, by the rules of `rules` or those of `runtime`
rules      how steps go as Harmony counts them, and as our lanes would allow
runtime    how they go as the runtime carries them out, and the plan for it
costs, clock, fair   what packs cost, and who listens while tasks come one by one
packing, residency   plans from sizes alone; what stays on the devices
"""

from harmony_lightning.scheduler.packing import automatic_microbatch_size, make_plan, unit_nbytes
from harmony_lightning.scheduler.residency import let_stay

__all__ = ["automatic_microbatch_size", "let_stay", "make_plan", "unit_nbytes"]
