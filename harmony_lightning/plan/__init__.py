"""The plan room: what to do, as frozen data. No torch in here."""

from harmony_lightning.plan.plan import ALIGNMENT, Pack, Plan, aligned
from harmony_lightning.plan.record import Record
from harmony_lightning.plan.validate import check_plan

__all__ = ["ALIGNMENT", "Pack", "Plan", "Record", "aligned", "check_plan"]
