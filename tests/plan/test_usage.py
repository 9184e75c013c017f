from harmony_lightning.plan import Held, Usage, VisitPeak


def usage(visits, held, resting):
    return Usage(
        visits=tuple(VisitPeak(pack=pack, nbytes=nbytes) for pack, nbytes in visits),
        held=tuple(Held(layers=(layer,), nbytes=nbytes) for layer, nbytes in held.items()),
        resting=resting,
    )


def test_two_steps_count_as_one_with_the_calls_of_both():
    one = usage([(0, (5, 1)), (2, (0, 9)), (0, (4, 0))], {"a": (3, 0), "c": (0, 2)}, (1, 0))
    other = usage([(0, (2, 3)), (1, (6, 6)), (2, (1, 1)), (0, (0, 7))], {"b": (8, 0), "a": (2, 2)}, (0, 2))
    both = usage([(0, (5, 3)), (1, (6, 6)), (2, (1, 9)), (0, (4, 7))], {"a": (3, 2), "c": (0, 2), "b": (8, 0)}, (0, 0))
    assert one.including(other) == both
    assert one.including(one) == one
