"""The machine: GPUs, their lanes, memory and byte counters, behind one small protocol (`device`).

`cuda` drives real GPUs, `emulated` stands in for them on any machine and counts every byte, `host` is a run without any.
The rest of the package talks to the protocol only.
"""
