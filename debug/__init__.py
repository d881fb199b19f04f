"""Saying where an engine differs from its reference, by how much, and why.

    verify.py    the reference against recorded upstream outputs     record.py    making such recordings
    diff.py      an engine against the reference, tap by tap         metrics.py   errors and noise floors
    cli.py       the whole `logitlock` command

May import everything above it: `refmodels`, `trt_runtime`, `export`; nothing imports debug.
"""
