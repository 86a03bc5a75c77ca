"""Groups of trials whose trainings are run together on one base.

Each trial runs its own code, in its own thread, up to the first step of its training (`take_steps_with_group`). There
it waits for the others of its group; then their steps are taken together, and each continues by itself. One thread
runs at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from adaptive_lora.errors import TrialFailed
from adaptive_lora.training.joint.grouped import mount, take_off
from adaptive_lora.training.joint.loop import JointTraining, Member, joining_problem

if TYPE_CHECKING:
    from adaptive_lora.training.trainer import Trainer

T = TypeVar("T")

_with_group: ContextVar[Callable[[Trainer], None]] = ContextVar("_with_group", default=lambda trainer: None)
"""Function that takes a training's steps with the group of this thread; outside a group it does nothing."""


def take_steps_with_group(trainer: Trainer) -> None:
    """Take all steps of a started training together with those of its group.

    Nothing is done outside a group, and where the training cannot join: the trainer then takes its steps itself.
    """
    _with_group.get()(trainer)


class JointGroup(Generic[T]):
    """Trials whose trainings are run together; what comes before and after runs one by one."""

    def __init__(self, works: Sequence[Callable[[], T]]) -> None:
        """Prepare a group of functions that each train once."""
        self._waiting: dict[PausableThread, Member] = {}
        self._said: set[str] = set()
        self._results: dict[PausableThread, T] = {}
        self._threads = [self._thread(work) for work in works]

    def run(self) -> list[T]:
        """Run all functions to the end and return their results; no thread is left running after an error."""
        try:
            for thread in self._threads:
                self._resume(thread)
            while self._waiting:
                members = list(self._waiting.values())
                JointTraining(members).run()
                for thread in list(self._waiting):
                    self._resume(thread, self._waiting.pop(thread).failure)
        except BaseException as error:
            stop = error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()
            for thread in self._threads:
                if thread.begun and not thread.ended:
                    thread.resume(stop)
            raise
        return [self._results[thread] for thread in self._threads]

    def _thread(self, work: Callable[[], T]) -> PausableThread:
        def run(thread: PausableThread) -> None:
            _with_group.set(partial(self._take_steps, thread))  # for this thread only
            self._results[thread] = work()

        return PausableThread(run)

    def _resume(self, thread: PausableThread, thrown: TrialFailed | None = None) -> None:
        thread.resume(thrown)
        if thread.error is not None:
            raise thread.error

    def _take_steps(self, thread: PausableThread, trainer: Trainer) -> None:
        """Pause the thread of a training until the group has taken its steps, unless it cannot join."""
        problem = joining_problem(trainer)
        if problem is not None:
            if problem not in self._said:
                self._said.add(problem)
                logging.getLogger(__name__).warning("trials train one by one: %s", problem)
            return
        model: Any = trainer.model
        layers = take_off(model)
        member = self._waiting[thread] = Member(trainer=trainer, layers=layers)
        started = time.perf_counter()
        try:
            thread.pause()
        finally:
            mount(model.get_base_model(), layers)
        trainer.waited_seconds += time.perf_counter() - started - member.own_seconds


class PausableThread:
    """A function in its own thread that can pause and continue later, with its whole call stack.

    The function is called with this object and may call `pause`.
    """

    def __init__(self, work: Callable[[PausableThread], object]) -> None:
        """Prepare the thread, which starts with the first `resume`."""
        self.begun = self.ended = False
        self.error: BaseException | None = None
        """Exception that ended the function, or None."""
        self._work = work
        self._thrown: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run)

    def resume(self, thrown: BaseException | None = None) -> None:
        """Let the function run until it pauses or ends; raise `thrown`, if given, where it had paused.

        Ctrl-C in the meantime is raised afterwards, because no other thread may run before.
        """
        self._thrown = thrown
        if not self.begun:
            self.begun = True
            self._thread.start()
        self._go.release()
        interruption: KeyboardInterrupt | None = None
        while True:
            try:
                self._stopped.acquire()
                break
            except KeyboardInterrupt as error:
                interruption = error
        if self.ended:
            self._thread.join()
        if interruption is not None:
            raise interruption

    def pause(self) -> None:
        """Pause until the next `resume`."""
        self._stopped.release()
        self._go.acquire()
        if self._thrown is not None:
            raise self._thrown

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._work(self)
        except BaseException as error:  # kept for the caller of `resume`
            self.error = error
        finally:
            self.ended = True
            self._stopped.release()
