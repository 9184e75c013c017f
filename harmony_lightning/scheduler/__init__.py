"""The scheduler room: from sizes to a plan. No torch in here."""

from harmony_lightning.scheduler.packing import automatic_microbatch_size, make_plan, unit_nbytes

__all__ = ["automatic_microbatch_size", "make_plan", "unit_nbytes"]
