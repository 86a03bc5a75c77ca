"""Base models, and their heads, devices, losses, scores, tasks and kernels."""
