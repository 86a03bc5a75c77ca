"""Threads of which one runs at a time, each until it pauses."""

from __future__ import annotations

import threading
from collections.abc import Callable


class PausableThread:
    """A function in its own thread that can pause and continue later, with its whole call stack."""

    def __init__(self, work: Callable[[PausableThread], object], name: str) -> None:
        """Prepare the thread; it starts with the first `resume`.

        Args:
            work: function called in the thread, with this object; it may call `pause`.
            name: name of the thread, for debuggers.
        """
        self.begun = self.ended = False
        self.error: BaseException | None = None
        """Exception that ended the function, or None."""
        self._work = work
        self._thrown: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name)

    def resume(self, thrown: BaseException | None = None) -> None:
        """Let the function run until it pauses or ends.

        Ctrl-C in the meantime is raised afterwards, because no other thread may run before.

        Args:
            thrown: exception to raise where the function had paused.
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
        """Pause until the next `resume`; called by the function itself."""
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
