"""Published schedules against ours: how well our simulation agrees with the published one, and how much faster we plan.

Reads the published profiles, machine and schedules from a folder, and prints the tables of the README beside this file.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from harmony_lightning.plan import Schedule
from harmony_lightning.profiler import read_machine, read_profile
from harmony_lightning.scheduler.costs import Costs
from harmony_lightning.scheduler.explain import describe
from harmony_lightning.scheduler.search.genetic import breed
from harmony_lightning.scheduler.search.own import search_own
from harmony_lightning.scheduler.search.schedules import search
from harmony_lightning.scheduler.simulate import Rules, peak_bytes, seconds

BEST = {
    "gpt2_xl 16 PP": 13.303, "gpt2_xl 16 DP": 18.342, "gpt2_xl 64 PP": 45.281, "gpt2_xl 64 DP": 48.508,
    "gpt2_xl 256 PP": 172.516, "gpt2_xl 256 DP": 169.172, "bert_96 16 PP": 7.229, "bert_96 16 DP": 10.710,
    "bert_96 64 PP": 19.056, "bert_96 64 DP": 22.642, "bert_96 256 PP": 68.995, "bert_96 256 DP": 71.097,
}  # fmt: skip
"""Seconds without overlap of what Harmony's own search finds with 9e9 bytes per GPU."""
TEN_BILLION = {"dp": {1: 371, 2: 201, 4: 127, 8: 110}, "pp": {1: 371, 2: 192, 4: 102, 8: 58}}
"""Seconds of hand-made schedules of gpt2_10b by mode and GPUs: 32 samples, microbatches of 1, packs of 2 layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / ".." / "shared" / "profiles")
    parser.add_argument("--memory", type=float, default=9e9, help="bytes per GPU")
    parser.add_argument("--genetic", action="store_true", help="the table of bred schedules alone")
    arguments = parser.parse_args()
    folder, memory = arguments.folder, arguments.memory
    machine = read_machine(folder / "machine.json")
    rows = json.loads((folder / "published_schedules.json").read_text())["schedules"]
    if arguments.genetic:
        tell_bred(list(rows), folder, memory)
        return

    print("| row | published s | ours | differs | published s, overlap | ours | differs | needs GB |")
    print("|---|---|---|---|---|---|---|---|")
    cases = []
    for row, entry in rows.items():
        model, minibatch, mode = row.split()
        costs = Costs(read_profile(folder / f"{model}.json"), machine)
        schedule = Schedule(
            mode=mode.lower(),
            num_devices=machine.gpus,
            minibatch=int(minibatch),
            microbatch_forward=entry["microbatch_forward"],
            packs_forward=tuple(map(tuple, entry["packs_forward"])),
            microbatch_backward=entry["microbatch_backward"],
            packs_backward=tuple(map(tuple, entry["packs_backward"])),
        )
        cases.append((row, entry, costs, schedule))
        cells = []
        for rules, column in (
            (Rules.HARMONY_SERIAL, "step_seconds_no_overlap"),
            (Rules.HARMONY, "step_seconds_overlap"),
        ):
            ours, theirs = seconds(schedule, costs, rules), entry[column]
            cells += [f"{theirs:.3f}", f"{ours:.3f}", f"{ours / theirs - 1:+.2%}"]
        print(f"| {row} | {' | '.join(cells)} | {peak_bytes(schedule, costs, Rules.HARMONY) / 1e9:.2f} |")

    print("\n| row | *best* | *shipped* | our search | *shipped*, overlap | our search, overlap | plan | GB | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    own = []
    for row, entry, costs, schedule in cases:
        found = {
            rules: search(costs, minibatch=schedule.minibatch, mode=schedule.mode, memory_bytes=memory, rules=rules)
            for rules in (Rules.HARMONY, Rules.HARMONY_SERIAL, Rules.OWN)
        }
        harmony = found[Rules.HARMONY]
        print(
            f"| {row} | {BEST[row]:.3f} | {entry['step_seconds_no_overlap']:.3f} "
            f"| {found[Rules.HARMONY_SERIAL].best.seconds:.3f} | {entry['step_seconds_overlap']:.3f} "
            f"| **{harmony.best.seconds:.3f}** | {describe(harmony.best.schedule)} | {harmony.best.peak_bytes / 1e9:.2f} "
            f"| {harmony.search_seconds:.2f} |"
        )
        began = time.process_time()
        ours = search_own(costs, minibatch=schedule.minibatch, mode=schedule.mode, memory_bytes=memory)
        took = time.process_time() - began
        own.append((row, entry["step_seconds_overlap"], schedule, costs, found[Rules.OWN], ours, took))

    print(
        "\n| row | *shipped*, overlap | the same under our rules | our search | what stays | faster | plan | GB | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row, shipped, schedule, costs, prefetching, ours, took in own:
        same = seconds(replace(schedule, prefetch=1), costs, Rules.OWN)
        stays = f"**{ours.best.seconds:.3f}**" if ours.rules == Rules.RUNTIME else "-"
        fastest = "" if ours.rules == Rules.RUNTIME else "**"
        print(
            f"| {row} | {shipped:.3f} | {same:.3f} | {fastest}{prefetching.best.seconds:.3f}{fastest} | {stays} "
            f"| {shipped / ours.best.seconds:.2f}x | {describe(ours.best.schedule)} | {ours.best.peak_bytes / 1e9:.2f} "
            f"| {took:.2f} |"
        )

    print("\n| gpt2_10b | published s | ours | our search, Harmony's rules | our search, our rules | s |")
    print("|---|---|---|---|---|---|")
    packs = tuple((first, first + 1) for first in range(0, 54, 2))
    for mode, by_gpus in TEN_BILLION.items():
        for gpus, published in by_gpus.items():
            costs = Costs(read_profile(folder / "gpt2_10b.json"), replace(machine, gpus=gpus, host_link_shared_by=gpus))
            schedule = Schedule(
                mode=mode,
                num_devices=gpus,
                minibatch=32,
                microbatch_forward=1,
                packs_forward=packs[:-1],
                microbatch_backward=1,
                packs_backward=packs,
            )
            found = {
                rules: search(costs, minibatch=32, mode=mode, memory_bytes=memory, rules=rules)
                for rules in (Rules.HARMONY, Rules.OWN)
            }
            print(
                f"| {mode}, N = {gpus} | {published} | {seconds(schedule, costs, Rules.HARMONY):.1f} "
                f"| {found[Rules.HARMONY].best.seconds:.1f} | {found[Rules.OWN].best.seconds:.1f} "
                f"| {found[Rules.HARMONY].search_seconds:.2f} |"
            )


def tell_bred(rows: list[str], folder: Path, memory: float) -> None:
    """Both searchers under both rules."""
    print("| row | our search, Harmony's rules | bred | | our search, our rules | bred | |")
    print("|---|---|---|---|---|---|---|")
    machine = read_machine(folder / "machine.json")
    for row in rows:
        model, minibatch, mode = row.split()
        costs = Costs(read_profile(folder / f"{model}.json"), machine)
        cells = []
        for rules in (Rules.HARMONY, Rules.OWN):
            wanted = {"minibatch": int(minibatch), "mode": mode.lower(), "memory_bytes": memory, "rules": rules}
            found, bred = (one(costs, **wanted).best.seconds for one in (search, breed))
            cells += [f"{found:.3f}", f"{bred:.3f}", f"{bred / found - 1:+.1%}"]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
