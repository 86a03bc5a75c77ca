"""Work in threads of which one runs at a time, each until it gives its turn back."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Seat:
    """A piece of work that can stop halfway and go on later, with its whole call stack."""

    def __init__(self, work: Callable[[Seat], object], name: str) -> None:
        """Prepare a piece of work; it begins with its first turn.

        Args:
            work: called with this seat, in a thread of its own; it may `pause`.
            name: of the thread, for debuggers.
        """
        self.begun = self.ended = False
        self.error: BaseException | None = None
        """What ended the work, where it did not end by itself."""
        self._work = work
        self._thrown: BaseException | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name)

    def turn(self, thrown: BaseException | None = None) -> None:
        """Let the work go on until it pauses or ends.

        Ctrl-C in the meantime is raised after that: another's turn must not begin before.

        Args:
            thrown: raised where the work had paused.
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
        """Give the turn back and return with the next one; for the work itself."""
        self._stopped.release()
        self._go.acquire()
        if self._thrown is not None:
            raise self._thrown

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._work(self)
        except BaseException as error:  # handed to whoever gave the turn
            self.error = error
        finally:
            self.ended = True
            self._stopped.release()
