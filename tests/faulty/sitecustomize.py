"""Faults of worker processes: Python imports this at its start where this folder is on PYTHONPATH.

FAULTS holds a JSON list of faults; each befalls one process, the first that comes to it, unless it has `node`: then all
processes with that Ray node's name. A fault is a dictionary: `module`, `name` of a function, `call` (which one),
`action`, and `mark`, the path of a file that is made when it happens.
"""

import errno
import importlib.util
import json
import os
import signal
import sys
import time


class Fault:
    """A finder of modules that spoils one function of the module that it waits for."""

    def __init__(self, fault):
        self.fault, self.calls = fault, 0

    def find_spec(self, name, path, target=None):
        """Find the module by the other finders, and have its function spoiled when it is loaded."""
        if name != self.fault["module"]:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            self.arm(module)

        spec.loader.exec_module = exec_module
        return spec

    def arm(self, module):
        """Replace the function."""
        *path, last = self.fault["name"].split(".")
        for part in path:
            module = getattr(module, part)
        whole = getattr(module, last)

        def spoiled(*args, **kwargs):
            self.calls += 1
            if self.calls == self.fault["call"] and self.is_first():
                self.happen()
            return whole(*args, **kwargs)

        setattr(module, last, spoiled)

    def is_first(self):
        """Return whether no other process has met the fault, and make its mark."""
        try:
            with open(self.fault["mark"], "x") as mark:
                mark.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def happen(self):
        """Let the fault happen."""
        match self.fault["action"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            case "slow":
                time.sleep(3)
            case "hold":  # until the test makes this file
                while not os.path.exists(self.fault["mark"] + ".go"):
                    time.sleep(0.1)
            case "wait":  # until the test ends this process
                time.sleep(3600)


sys.meta_path[:0] = [Fault(fault) for fault in json.loads(os.environ.get("FAULTS", "[]"))]
