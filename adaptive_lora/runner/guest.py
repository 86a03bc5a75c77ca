"""A study inside a running program: what libraries set for the whole process is as before when it ends."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_BARS = {"transformers.utils.logging": "enable_progress_bar", "datasets": "enable_progress_bars"}
"""Module -> its function that switches progress bars on."""


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Give the process's settings their state back after the block.

    These are the environment, levels and handlers of loggers, warning filters, torch's random streams, progress bars
    of transformers and datasets, and the state that accelerate shares among accelerators.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.callback(_restore_environment, dict(os.environ))
        known = logging.root.manager.loggerDict.values()
        for logger in (logging.root, *(each for each in known if isinstance(each, logging.Logger))):
            stack.callback(_restore_logger, logger, logger.level, list(logger.handlers), logger.disabled)
        for state in _shared_states():
            stack.callback(_restore_state, state, dict(state))
        stack.callback(_restore_bars, _hidden_bars())
        if (torch := sys.modules.get("torch")) is not None:
            devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
            stack.enter_context(torch.random.fork_rng(devices))
        yield


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _restore_logger(logger: logging.Logger, level: int, handlers: list[logging.Handler], disabled: bool) -> None:
    logger.setLevel(level)
    logger.handlers[:] = handlers
    logger.disabled = disabled


def _shared_states() -> list[dict[str, Any]]:
    """Return what accelerate keeps for all accelerators of the process; empty before it is loaded."""
    if "accelerate" not in sys.modules:
        return []
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]


def _restore_state(state: dict[str, Any], before: dict[str, Any]) -> None:
    state.clear()
    state.update(before)


def _hidden_bars() -> set[str]:
    """Return the libraries, among those that are loaded, whose progress bars are off."""
    transformers, datasets = (sys.modules.get(name) for name in _BARS)
    hidden = set()
    if transformers is not None and not transformers.is_progress_bar_enabled():
        hidden.add(transformers.__name__)
    if datasets is not None and datasets.are_progress_bars_disabled():
        hidden.add(datasets.__name__)
    return hidden


def _restore_bars(hidden: set[str]) -> None:
    for name in _hidden_bars() - hidden:
        getattr(sys.modules[name], _BARS[name])()
