"""The fork blocks that each request holds, and how many of its forks hold its tail."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class _Grant:
    """One request's share of the pool.

    Attributes:
        place: index of the share.
        num_mirrored: fork paths that hold the request's tail; 1: only its own blocks.
        num_tokens: number of the request's tokens up to which they hold it.

    """

    place: int
    num_mirrored: int = 1
    num_tokens: int = -1


class ForkGrants:
    """Grants shares of the fork pool to requests.

    Args:
        num_places: number of shares.

    """

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._free = list(range(num_places))[::-1]
        self._grants: dict[str, _Grant] = {}

    @property
    def num_granted(self) -> int:
        """Number of shares in use."""
        return len(self._grants)

    def place_of(self, req_id: str) -> int:
        """Return the share that a request holds; 0 if it holds none."""
        grant = self._grants.get(req_id)
        return 0 if grant is None else grant.place

    def acquire(self, req_id: str) -> bool:
        """Give the request a share if it has none; return whether it has one now."""
        if req_id in self._grants:
            return True
        if not self._free:
            return False
        self._grants[req_id] = _Grant(self._free.pop())
        return True

    def release(self, req_ids: Iterable[str]) -> None:
        """Take back the shares of these requests, if they have any."""
        for req_id in req_ids:
            grant = self._grants.pop(req_id, None)
            if grant is not None:
                self._free.append(grant.place)

    def num_mirrored(self, req_id: str, num_tokens: int) -> int:
        """Return how many fork paths hold the request's tail up to ``num_tokens``, at least 1."""
        grant = self._grants.get(req_id)
        return grant.num_mirrored if grant is not None and grant.num_tokens == num_tokens else 1

    def set_mirrored(self, req_id: str, num_tokens: int, num_mirrored: int) -> None:
        """Record that this many fork paths hold the request's tail up to ``num_tokens``."""
        grant = self._grants.get(req_id)
        if grant is not None:
            grant.num_tokens, grant.num_mirrored = num_tokens, num_mirrored
