"""Bases and what computes with them: heads, devices, losses, scores, tasks and kernels."""
