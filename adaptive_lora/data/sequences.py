"""Sequences whose items are fetched on access: rows chosen by index, and several sequences as one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TypeVar, overload

T = TypeVar("T")

ROWS_AT_ONCE = 1000
"""Number of rows of a batch; the last one may have fewer."""


class LazySequence(Sequence[T]):
    """A sequence whose items are made anew on each access, so that they are equal, not identical."""

    @abstractmethod
    def item(self, index: int) -> T:
        """Return the item at an index from 0."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Rows[T]: ...
    def __getitem__(self, index: int | slice) -> T | Rows[T]:
        """Return an item; for a slice, the sequence of its items."""
        places = range(len(self))[index]
        return Rows(self, places) if isinstance(places, range) else self.item(places)

    def __iter__(self) -> Iterator[T]:
        """Yield the items, each made when it is asked for."""
        return map(self.item, range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Return whether another sequence has equal items in this order."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Rows(LazySequence[T]):
    """Items of a sequence, chosen by index."""

    def __init__(self, source: Sequence[T], indices: Sequence[int]) -> None:
        """Choose the items, in the order of their indices."""
        self._source = source
        self.indices = indices
        """Index of each item in the sequence that it was chosen from."""

    def __len__(self) -> int:
        """Return the number of chosen items."""
        return len(self.indices)

    def item(self, index: int) -> T:
        """Return the chosen item at an index."""
        return self._source[self.indices[index]]


class Joined(LazySequence[T]):
    """Several sequences, one after the other."""

    def __init__(self, *parts: Sequence[T]) -> None:
        """Join the sequences in this order."""
        self._parts = parts

    def __iter__(self) -> Iterator[T]:
        """Yield the items; each part reads its own in order, which may take less than one by one."""
        return chain.from_iterable(self._parts)

    def __len__(self) -> int:
        """Return the number of items of all parts."""
        return sum(map(len, self._parts))

    def item(self, index: int) -> T:
        """Return the item of the part that an index falls into."""
        for part in self._parts[:-1]:
            if index < len(part):
                return part[index]
            index -= len(part)
        return self._parts[-1][index]


def batched(rows: Iterable[T]) -> Iterator[list[T]]:
    """Yield the rows in lists of `ROWS_AT_ONCE`."""
    remaining = iter(rows)
    while batch := list(islice(remaining, ROWS_AT_ONCE)):
        yield batch
