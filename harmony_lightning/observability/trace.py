"""Timelines as traces that Perfetto (ui.perfetto.dev) and chrome://tracing open: one process per device, one row per lane.

Format: Trace Event Format, complete events ("X") with times in microseconds and metadata events ("M") for names.
"""

import json
from typing import Any

from harmony_lightning.plan.timeline import HOST, Timeline


def chrome_trace(timeline: Timeline) -> str:
    """The timeline in JSON of the Trace Event Format."""
    rows: dict[tuple[int, str], int] = {}
    for span in timeline.spans:
        rows.setdefault((span.device, span.lane), len(rows))
    events: list[dict[str, Any]] = []
    for device in dict.fromkeys(device for device, _ in rows):
        name = "host" if device == HOST else f"gpu{device}"
        events.append({"ph": "M", "name": "process_name", "pid": device, "args": {"name": name}})
    for (device, lane), row in rows.items():
        events.append({"ph": "M", "name": "thread_name", "pid": device, "tid": row, "args": {"name": lane}})
    for span in timeline.spans:
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "pid": span.device,
                "tid": rows[span.device, span.lane],
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"bytes": span.nbytes, "flops": span.flops},
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
