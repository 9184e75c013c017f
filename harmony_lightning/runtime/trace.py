"""What the first step shows of the real order of calls.

The first plan is made from the order in which layers are registered. The first microbatch of the first step tells in
which order they are called, and which take turns in a loop; if that differs, the next step gets a better plan.
"""


class Trace:
    """The layer calls of one microbatch of one step."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        """Layer names; immediate repetitions once."""
        self.is_complete = False

    def record(self, microbatch: int, layer: str) -> None:
        if not self.is_complete and microbatch == 0 and (not self.calls or self.calls[-1] != layer):
            self.calls.append(layer)

    def end_step(self) -> None:
        self.is_complete = True

    def order(self) -> tuple[str, ...]:
        """Layers by their first call."""
        return tuple(dict.fromkeys(self.calls))

    def loops(self) -> tuple[frozenset[str], ...]:
        """Sets of layers that call each other in turn: strongly connected by calls that happen more than once."""
        follows: dict[str, set[str]] = {}
        seen: set[tuple[str, str]] = set()
        for before, after in zip(self.calls, self.calls[1:], strict=False):
            if (before, after) in seen:
                follows.setdefault(before, set()).add(after)
            seen.add((before, after))
        loops: list[frozenset[str]] = []
        for layer in follows:
            if not any(layer in loop for loop in loops):
                cycle = frozenset(other for other in _reach(layer, follows) if layer in _reach(other, follows))
                if len(cycle) > 1:
                    loops.append(cycle)
        return tuple(loops)


def _reach(start: str, follows: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        for following in follows.get(ahead.pop(), ()):
            if following not in found:
                found.add(following)
                ahead.append(following)
    return found
