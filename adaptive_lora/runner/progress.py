"""Progress display of a study: trial, step, loss, time left."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adaptive_lora.redaction import shown
from adaptive_lora.training import StepEvent

if TYPE_CHECKING:
    from adaptive_lora.tracking import Store


def say_place(store: Store, console: Console) -> None:
    """Print the store and experiment of the results, and who chose the experiment."""
    text = f"[bold]records[/]   {shown(store.shown_place)}"
    console.print(text, highlight=False, soft_wrap=True)


class StudyProgress:
    """A live display in a terminal; one line per trial elsewhere (logs, CI)."""

    def __init__(self, console: Console, trials: int) -> None:
        """Prepare the display for a number of trials; to be entered as a context manager."""
        self.console = console
        self._trials, self._done = trials, 0
        self._started = time.perf_counter()
        self._running: dict[str, float] = {}
        self._task = TaskID(0)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[done]}/{task.total:.0f} trials"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=600,
        )

    def __enter__(self) -> StudyProgress:
        """Start the display."""
        self._progress.start()
        self._task = self._progress.add_task("starting", total=self._trials, done=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the display and restore the terminal."""
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line above the display."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def skip(self, finished: int, stopped: int = 0) -> None:
        """Subtract trials that an earlier run of the study finished, or a race stopped."""
        self._trials -= finished + stopped
        self._progress.update(self._task, total=self._trials)
        if finished:
            race = f", {stopped} stopped by the race" if stopped else ""
            trials = "1 trial is" if finished == 1 else f"{finished} trials are"
            self.note(f"{trials} finished already{race}; {self._trials} to run")

    def add(self, trials: int) -> None:
        """Add trials that were not known at the start."""
        self._trials += trials
        self._progress.update(self._task, total=self._trials)

    def wait_for_room(self) -> None:
        """Show that no machine has room for a worker at present."""
        self._progress.update(self._task, description="waiting for a machine with room")

    def begin(self, label: str) -> None:
        """Show the name of a trial that starts."""
        self._running[label] = 0.0
        self._progress.update(self._task, description=f"[bold]{shown(label)}[/]")

    def step(self, label: str, event: StepEvent) -> None:
        """Show step and loss of a trial."""
        # the rest is evaluation and logging
        self._running[label] = 0.95 * event.step / event.total_steps
        self._progress.update(
            self._task,
            completed=self._done + sum(self._running.values()),
            description=f"[bold]{shown(label)}[/] step {event.step}/{event.total_steps} loss {event.loss:.3f}",
        )

    def drop(self, labels: Iterable[str]) -> None:
        """Subtract trials that a race stopped."""
        dropped = set(labels)
        self._trials -= len(dropped)
        for label in dropped:
            self._running.pop(label, None)
        self._progress.update(self._task, total=self._trials)

    def end(self, label: str, text: str) -> None:
        """Print a trial's outcome and count it."""
        self._done += 1
        self._running.pop(label, None)
        self._progress.update(self._task, completed=self._done + sum(self._running.values()), done=self._done)
        elapsed = time.perf_counter() - self._started
        left = elapsed / self._done * (self._trials - self._done)
        self.note(f"[dim]{self._done:>3}/{self._trials}[/] {shown(f'{label:<47}')} {text}  [dim]{_clock(left)} left[/]")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines that may quote untrusted text."""
    for line in lines:
        console.print(shown(line), highlight=False, soft_wrap=True)
