"""Processes that train one trial together: who does what, sums over them, and agreement on how a step ends.

Every process holds the whole adapter. A step's examples are divided over the processes, and the gradients are added up
once before the optimiser's step. DDP's wrapper would add nothing: it averages over processes where a sum is needed (a
loss is a mean over all tokens of a step, however they are divided), expects the same number of passes in each process,
and takes no parameters that are replaced in training. Adapters are so small that a sum after the backward pass costs
less than one layer's passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed, nn

from adaptive_lora.data import Batch
from adaptive_lora.errors import ProcessLost, TrialFailed
from adaptive_lora.interruption import Interrupted, held_signal, ignore_signals, whole

S = TypeVar("S")
T = TypeVar("T")

_PATIENCE = timedelta(days=30)
"""Time that processes wait for the first one, which may be busy with other trials, the store or the report."""
_BUCKET = 1 << 24
"""Number of gradient elements that are added up at once."""


class Abandoned(KeyboardInterrupt):
    """The first process gave up a trial that this process trains with it."""


class Processes:
    """The processes of a command: one, or several that train each trial together.

    With one process nothing is exchanged, and every method returns what it was given.
    """

    def __init__(self, count: int = 1, index: int = 0, *, sharded: bool = False) -> None:
        """Join the processes of an initialised process group.

        Args:
            count: number of processes.
            index: index of this process.
            sharded: whether the base's weights are divided over them, so that all must run every forward pass.
        """
        self.count, self.index, self.sharded = count, index, sharded
        self.together = False
        """State of the processes: true while all of them run the same trial."""
        self.out_of_step = False
        """State of the processes: true once they end each by itself, so that nothing can be exchanged any more."""
        self._agreed: BaseException | None = None
        # Objects and flags are exchanged on the CPU, beside the device's own group and its short time limit.
        self._control = distributed.new_group(backend="gloo", timeout=_PATIENCE) if count > 1 else None

    @property
    def leads(self) -> bool:
        """Role of this process: true for the first, which alone records, writes and prints."""
        return self.index == 0

    @property
    def divides(self) -> bool:
        """Division of scoring: true if each process now scores a part of the examples."""
        return self.together and not self.sharded

    def share(self, value: T) -> T:
        """Return the first process's value in all of them."""
        if self.count == 1:
            return value
        values = [value]
        with _lost_processes():
            distributed.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by index."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _lost_processes():
            distributed.all_gather_object(values, value, group=self._control)
        return values

    def total(self, value: float) -> float:
        """Return the sum of a number over the processes."""
        return value if self.count == 1 else float(self._added(np.array([value]))[0])

    def _added(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        tensor = torch.from_numpy(values)
        with _lost_processes():
            distributed.all_reduce(tensor, group=self._control)
        return tensor.numpy()

    def divided(self, work: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Return the results of a function on items, each computed by one process while they divide scoring."""
        if not self.divides:
            return [work(item) for item in items]
        own = [work(item) for item in items[self.index :: self.count]]
        return [result for results in self.gather(own) for result in results]

    def parts(self, batch: Batch, rows: int) -> Iterator[tuple[Batch, bool]]:
        """Yield this process's micro-batches of a training batch, and whether each counts.

        One that does not count stands in for examples of a process that has none, and completes the passes over a
        sharded base, which all processes take together.

        Args:
            batch: batch of all processes.
            rows: maximum number of examples of a micro-batch.
        """
        if self.count == 1:
            yield from ((part, True) for part in batch.parts(rows))
            return
        shares = [batch.examples] if batch.whole else _shares(batch.examples, self.count)
        own = slice(sum(shares[: self.index]), sum(shares[: self.index + 1]))
        mine = batch if len(shares) == 1 else batch.rows(own)
        found = mine.parts(rows) if self.index < len(shares) and shares[self.index] else []
        yield from ((part, True) for part in found)
        most = 1 if batch.whole or not self.sharded else -(-max(shares) // rows)
        filler = batch if batch.whole else batch.rows(slice(0, 1))
        yield from ((filler, False) for _ in range(most - len(found)))

    def start_equal(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give trained parameters the first process's values."""
        for parameter in parameters if self.count > 1 else ():
            with _lost_processes():
                distributed.broadcast(parameter.data, src=0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add gradients up over the processes, in place; a parameter that got none in any of them keeps none."""
        if self.count == 1:
            return
        reached = self._added(np.array([p.grad is not None for p in parameters], dtype=np.int64))
        gradients: list[torch.Tensor] = []
        for parameter, count in zip(parameters, reached, strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            with _lost_processes():
                distributed.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    @contextmanager
    def one_trial(self) -> Iterator[None]:
        """Run the same trial in all processes inside the block; signals wait for the next `alike`."""
        if self.count == 1:
            yield
            return
        self.together, self._agreed = True, None
        try:
            with whole():
                yield
                with self.alike():
                    pass
        except BaseException as error:
            self.out_of_step |= error is not self._agreed and not isinstance(error, TrialFailed)
            raise
        finally:
            self.together = False

    @contextmanager
    def alike(self) -> Iterator[None]:
        """End the block in all processes as in the one where it failed, or which received a signal.

        Raises:
            Interrupted: a process received a signal.
            Abandoned: the block failed in the first process, which has the error.
            ProcessLost: the block failed in another one; the message has its error.
        """
        if self.count == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
        number = held_signal()
        if self.total(float(error is not None or number is not None)):
            found = self.gather((None if error is None else f"{type(error).__name__}: {error}", number))
            error = error or _counterpart(found)
            self._agreed = error
            if isinstance(error, Interrupted):  # which ends every process
                ignore_signals()
                self.out_of_step = True
        if error is not None:
            raise error

    def require_equal(self, what: str, value: str) -> None:
        """Check that a text, such as a plan as JSON, is the same in all processes.

        Raises:
            ProcessLost: it is not.
        """
        others = [index for index, other in enumerate(self.gather(value)) if other != value]
        if others:
            raise ProcessLost(
                f"{what} differs between process {self.index} and process {others[0]} of {self.count}. All of them "
                "need the same files, options and versions of packages; check those of each machine."
            )


def _counterpart(found: Sequence[tuple[str | None, int | None]]) -> BaseException:
    """Return what a process raises for the error or signal of another one."""
    signals = [number for _, number in found if number is not None]
    if signals:
        return Interrupted(signals[0])
    if found[0][0] is not None:
        return Abandoned()
    index, text = next((index, text) for index, (text, _) in enumerate(found) if text is not None)
    return ProcessLost(f"process {index} of {len(found)} failed: {text}")


@contextmanager
def _lost_processes() -> Iterator[None]:
    """Name the reason where an exchange fails because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            "another of the processes that train this trial has ended; its own message says why. The same command "
            "continues from the last checkpoint."
        ) from error


def _shares(examples: int, count: int) -> list[int]:
    """Return the number of a batch's examples that each process takes, as equal as possible."""
    return [examples * (index + 1) // count - examples * index // count for index in range(count)]


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors in groups of one type that are added up at once."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
