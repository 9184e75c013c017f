"""Few cases that hold every pair of values of any two features: most faults need no more than two features to show."""

import itertools
import random


def covering_pairs(features, is_possible, candidates=150):
    """Cases (dicts) such that every pair of values of two features is in one of them.

    Greedy: each case starts from the first pair that no case has, and the best of some random completions is kept, always
    the same ones. Pairs that no possible case was found for are left out: see `missing_pairs`.

    Args:
        features: values by feature name, the usual value first.
        is_possible: tells of a case whether its values go together.
        candidates: how many completions are tried for a case.
    """
    draw = random.Random(0)
    names = list(features)
    missing = dict.fromkeys(
        ((one, a), (other, b))
        for one, other in itertools.combinations(names, 2)
        for a in features[one]
        for b in features[other]
    )
    cases = []
    while missing:
        pair = dict(next(iter(missing)))
        usual = {name: values[0] for name, values in features.items()} | pair
        drawn = [{name: draw.choice(values) for name, values in features.items()} | pair for _ in range(candidates)]
        possible = [case for case in (*drawn, usual) if is_possible(case)]
        if not possible:
            del missing[next(iter(missing))]
            continue
        best = max(possible, key=lambda case: sum(found in missing for found in pairs_of(case)))
        cases.append(best)
        for found in pairs_of(best):
            missing.pop(found, None)
    return cases


def pairs_of(case):
    return list(itertools.combinations(case.items(), 2))
