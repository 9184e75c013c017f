"""The automatic plan against the best of all plans, on the emulated clock; `README.md` tells how to read the table."""

import argparse
import time

from cases import CASES, automatic, best_of_sweep, train

from harmony_lightning.scheduler.explain import describe
from harmony_lightning.scheduler.runtime.steps import fair_seconds

HEADER = (
    "| case | machine | automatic plan | predicted | it takes | best of a sweep | plans tried | automatic / best | took |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(case) -> str:
    planned, layers = automatic(case)
    schedule = planned.found.best.schedule
    taken = train(case, schedule, layers)
    predicted = fair_seconds(schedule, planned.costs)
    begin = time.perf_counter()
    seconds, _, count, tried = best_of_sweep(case, layers, planned.costs)
    took = time.perf_counter() - begin
    return (
        f"| {case.name} | {case.num_gpus}x {case.gpu} of {case.memory}, {case.host} | {describe(schedule)} | "
        f"{1e3 * predicted:.2f} ms | {1e3 * taken:.2f} ms | {1e3 * seconds:.2f} ms | {tried} of {count} | "
        f"{taken / seconds:.3f} | {took:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=int, nargs="*", help="numbers of cases, from 0; all if none is given")
    arguments = parser.parse_args()
    print(HEADER)
    for case in [CASES[index] for index in arguments.case] if arguments.case else CASES:
        print(row(case), flush=True)


if __name__ == "__main__":
    main()
