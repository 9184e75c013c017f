"""The scheduler room: from sizes to a plan. No torch in here."""

from harmony_lightning.scheduler.packing import automatic_microbatch_size, make_plan, unit_nbytes
from harmony_lightning.scheduler.residency import let_stay

__all__ = ["automatic_microbatch_size", "let_stay", "make_plan", "unit_nbytes"]
