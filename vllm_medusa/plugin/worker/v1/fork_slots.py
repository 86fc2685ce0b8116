"""Which request holds which fork blocks."""

from __future__ import annotations

from collections.abc import Iterable


class ForkSlots:
    """Which request holds which slot of the pool, and how far its forks mirror its tail."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))[::-1]
        self._slot: dict[str, int] = {}
        self._mirrored: dict[str, tuple[int, int]] = {}

    @property
    def num_held(self) -> int:
        """Number of slots in use."""
        return len(self._slot)

    def get(self, req_id: str) -> int:
        """Return the slot a request holds."""
        return self._slot[req_id]

    def acquire(self, req_id: str) -> bool:
        """Give the request a slot if it has none; return whether it has one now."""
        if req_id in self._slot:
            return True
        if not self._free:
            return False
        self._slot[req_id] = self._free.pop()
        return True

    def release(self, req_ids: Iterable[str]) -> None:
        """Take back the slots of these requests, if they have any."""
        for req_id in req_ids:
            slot = self._slot.pop(req_id, None)
            self._mirrored.pop(req_id, None)
            if slot is not None:
                self._free.append(slot)

    def is_mirrored(self, req_id: str, num_tokens: int, num_paths: int) -> bool:
        """Whether the request's first ``num_paths`` paths hold its tail up to ``num_tokens``."""
        tokens, paths = self._mirrored.get(req_id, (-1, 0))
        return tokens == num_tokens and paths >= num_paths

    def set_mirrored(self, req_id: str, num_tokens: int, num_paths: int) -> None:
        """Note that the request's first ``num_paths`` paths hold its tail up to ``num_tokens``."""
        self._mirrored[req_id] = (num_tokens, num_paths)
