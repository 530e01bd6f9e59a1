"""A queue that takes turns over its clients, and within a client serves who came first."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items by client; not thread-safe."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, deque[Item]] = OrderedDict()  # whose turn it is first, comes first
        self._count = 0

    def __len__(self) -> int:
        """Number of items of all clients."""
        return self._count

    def __iter__(self) -> Iterator[Item]:
        """All items, client by client."""
        for items in self._clients.values():
            yield from items

    def push(self, client: str, item: Item) -> None:
        """Put an item last of its client's."""
        self._clients.setdefault(client, deque()).append(item)
        self._count += 1

    def take(self, most: int, goes_with: Callable[[list[Item], Item], bool]) -> list[Item]:
        """Take up to ``most`` items in turn.

        The first is whose turn it is, if ``goes_with([], first)``; later ones join while
        ``goes_with(those taken, item)``. A client whose next item does not join waits, and keeps its turn.
        """
        taken: list[Item] = []
        out: set[str] = set()
        while len(taken) < most:
            client = next((name for name in self._clients if name not in out), None)
            if client is None:
                break
            items = self._clients[client]
            if not goes_with(taken, items[0]):
                if not taken:
                    break
                out.add(client)
                continue
            taken.append(items.popleft())
            self._count -= 1
            del self._clients[client]
            if items:
                self._clients[client] = items  # behind all others
        return taken

    def remove(self, wanted: Callable[[Item], bool]) -> list[Item]:
        """Take out all items that are ``wanted``."""
        gone = [item for item in self if wanted(item)]
        if gone:
            for client, items in list(self._clients.items()):
                left = deque(item for item in items if not wanted(item))
                if left:
                    self._clients[client] = left
                else:
                    del self._clients[client]
            self._count -= len(gone)
        return gone
