"""The grid of trials: contexts, one trial's run, executors, verdict."""
