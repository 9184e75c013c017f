"""The plan room: what to do, as frozen data. No torch in here."""

from harmony_lightning.plan.graph import Kind, Lane, Task, TaskGraph, TaskTimes
from harmony_lightning.plan.offsets import ALIGNMENT, Lifetime, aligned, lay_at_offsets
from harmony_lightning.plan.plan import Pack, Plan, Urgency
from harmony_lightning.plan.refit import refit
from harmony_lightning.plan.schedule import Schedule, Span
from harmony_lightning.plan.usage import Held, Seen, Usage, VisitPeak, summed_nbytes, travelling_nbytes
from harmony_lightning.plan.validate import check_plan, order_fault, plan_fault
from harmony_lightning.record import Record

__all__ = [
    "ALIGNMENT",
    "Held",
    "Kind",
    "Lane",
    "Lifetime",
    "Pack",
    "Plan",
    "Record",
    "Schedule",
    "Seen",
    "Span",
    "Task",
    "TaskGraph",
    "TaskTimes",
    "Urgency",
    "Usage",
    "VisitPeak",
    "aligned",
    "check_plan",
    "lay_at_offsets",
    "order_fault",
    "plan_fault",
    "refit",
    "summed_nbytes",
    "travelling_nbytes",
]
