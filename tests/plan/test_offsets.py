import random

from hypothesis import given
from hypothesis import strategies as st

from harmony_lightning.plan import ALIGNMENT, Lifetime, aligned, lay_at_offsets
from harmony_lightning.plan.offsets import extent, most_alive

SIZES = st.integers(0, 1 << 20).map(aligned)
LIFETIMES = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 8), SIZES).map(lambda one: Lifetime(one[0], one[0] + one[1], one[2])),
    max_size=12,
).map(tuple)


@given(LIFETIMES)
def test_what_is_alive_at_once_does_not_overlap(lifetimes):
    offsets = lay_at_offsets(lifetimes)
    assert len(offsets) == len(lifetimes)
    assert all(offset >= 0 and offset % ALIGNMENT == 0 for offset in offsets)
    placed = list(zip(lifetimes, offsets, strict=True))
    for index, (one, start) in enumerate(placed):
        for other, at in placed[:index]:
            assert not one.meets(other) or start + one.nbytes <= at or at + other.nbytes <= start
    assert extent(lifetimes, offsets) >= most_alive(lifetimes)


@given(st.lists(SIZES, max_size=30))
def test_neighbours_take_what_the_largest_two_of_them_take(sizes):
    """Packs of which the next comes while one is in use."""
    lifetimes = tuple(Lifetime(index, index + 2, nbytes) for index, nbytes in enumerate(sizes))
    assert extent(lifetimes, lay_at_offsets(lifetimes)) == most_alive(lifetimes)


def test_others_take_little_more_than_is_alive_at_once():
    random.seed(0)
    ratios = []
    for _ in range(100):
        starts = [random.randrange(40) for _ in range(30)]
        lifetimes = tuple(
            Lifetime(start, start + random.randrange(1, 12), aligned(random.randrange(1, 1 << 20))) for start in starts
        )
        ratios.append(extent(lifetimes, lay_at_offsets(lifetimes)) / most_alive(lifetimes))
    assert sum(ratios) / len(ratios) < 1.06
    assert max(ratios) < 1.25


def test_the_same_lifetimes_lie_at_the_same_offsets():
    lifetimes = tuple(Lifetime(start % 5, start % 5 + 2, 64 * (start % 3)) for start in range(20))
    found = lay_at_offsets(lifetimes)
    lay_at_offsets.cache_clear()
    assert lay_at_offsets(lifetimes) == found
