"""Engines: the processes that run a study's trials, and the dispatcher that hands them out.

`here` runs them in this process; `dispatch` gives them to worker processes, of this machine (`processes`) or of a Ray
cluster (`ray_cluster`). A worker (`worker`) loads base and data once and keeps them over its trials.
"""
