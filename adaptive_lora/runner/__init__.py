"""The grid of trials: contexts, the run of one trial, the schedule, comparison."""
