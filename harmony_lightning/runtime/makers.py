"""Which microbatch has made a node of the graph.

Microbatches take turns at the borders of packs. What user code keeps in an attribute by then is set by all of them, and
each reads what the last one has set. A gradient that goes there is not this microbatch's: autograd would tell of a graph
that is differentiated a second time, and not of the reason.
"""

from typing import Any

from harmony_lightning.errors import UnsupportedError
from harmony_lightning.runtime.segment import Segment


def refuse_others(microbatch: int, node: Any) -> None:
    """A gradient of this microbatch goes to a node, whose maker the next layer or import in front of it tells.

    Raises:
        UnsupportedError: another microbatch. On one device it fails, too: that one's graph has been differentiated by then.
    """
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        call, sink = getattr(node, "call", None), getattr(node, "sink", None)
        maker = getattr(call, "segment", None) or getattr(getattr(sink, "func", None), "__self__", None)
        if isinstance(maker, Segment):
            if maker.microbatch != microbatch:
                place = f"pack {maker.pack}" if call is None else f"layer {call.site.name}"
                raise UnsupportedError(
                    f"microbatch {microbatch} differentiates what microbatch {maker.microbatch} has made, in {place} or "
                    f"behind it: microbatches take turns at the borders of packs, so what one has kept in an attribute was "
                    f"set by another when it is read again. Hand it on as an argument and a result; or keep the code that "
                    f"sets it and the code that reads it in one layer: HarmonyStrategy(layers=[ThatModule]); or train with "
                    f"one microbatch: microbatch_size as large as the batch"
                )
            return
        waiting += [before for before, _ in node.next_functions]
