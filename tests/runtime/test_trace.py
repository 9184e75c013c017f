import pytest

from harmony_lightning.runtime.trace import Trace


def traced(calls):
    trace = Trace()
    for layer in calls:
        trace.record(0, layer)
    return trace


def test_layers_are_ordered_by_their_first_call():
    assert traced("abcab").order() == ("a", "b", "c")
    assert traced("").order() == ()


def test_only_the_first_microbatch_of_the_first_step_counts():
    trace = traced("ab")
    trace.record(1, "z")
    assert not trace.is_complete
    trace.end_step()
    trace.record(0, "y")
    assert trace.is_complete
    assert trace.calls == ["a", "b"]


def test_immediate_repetitions_count_once():
    assert traced("aaabba").calls == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("calls", "loops"),
    [
        ("", []),
        ("abc", []),
        ("aaaa", []),
        ("abab", []),  # may be a layer that is used twice: the way back was gone once only
        ("ababab", ["ab"]),
        ("xabababy", ["ab"]),
        ("abcabcabc", ["abc"]),
        ("abababcdcdcd", ["ab", "cd"]),
        ("abcbabcbabcb", ["abc"]),
        ("abxacxabxacx", ["abcx"]),
        ("abcbd", []),
        ("abcdabcd", []),  # the way back was gone once only
    ],
)
def test_loops_are_layers_that_take_turns(calls, loops):
    found = traced(calls).loops()
    assert [set(loop) for loop in found] == [set(loop) for loop in loops]
