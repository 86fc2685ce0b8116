"""An index of a text that grows with it and finds earlier places of its last tokens.

For n-grams of a few lengths it stores the last place of each, and for each place the one before
(hash chains, as in LZ77). The cost of adding a token and of a search does not depend on the text's
length, except for n-grams with equal hashes. A token takes 36 to 72 bytes of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.types import Ints

#: Lengths of the n-grams that are looked up.
ORDERS = (1, 2, 4, 8)
#: Tokens before a place that `TextIndex.windows` shows: longer matches count as that long.
BEHIND = 16
#: Tokens from a place on that it shows.
AHEAD = 32
#: What a window holds where there is no token.
NO_TOKEN = -1
_FIRST_CAPACITY = 256
#: Odd factor of multiplicative hashing: 2**64 divided by the golden ratio.
_FACTOR = 0x9E3779B97F4A7C15 - 2**64


def keys_of(tokens: Sequence[int]) -> list[int]:
    """Return the last tokens of a text, by which `TextIndex.places` looks up."""
    return list(tokens[-ORDERS[-1] :])


class TextIndex:
    """The places of all n-grams of one text.

    A *place* is the index of the token that followed an n-gram.

    Args:
        max_tokens: if a text becomes longer, its older half is removed.

    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        #: Tokens that were ever added.
        self.num_added = 0
        self._length = 0
        self._allocate(0)

    def __len__(self) -> int:
        return self._length

    @property
    def keys(self) -> list[int]:
        """The text's own `keys_of`."""
        stop = BEHIND + self._length
        keys: list[int] = self._buffer[max(BEHIND, stop - ORDERS[-1]) : stop].tolist()
        return keys

    def extend(self, tokens: ArrayLike) -> None:
        """Add tokens [n] to the end of the text."""
        new = np.asarray(tokens)
        self.num_added += len(new)
        if self._length + len(new) > self._max_tokens:
            new = np.concatenate((self.tokens(), new))[-(self._max_tokens // 2) :]
            self._length = 0
            self._allocate(len(new))
        start, stop = self._length, self._length + len(new)
        if stop > self._capacity:
            before = self.tokens()
            self._allocate(stop)
            self._buffer[BEHIND : BEHIND + start] = before
            _insert(self._buffer, self._last, self._before, 0, start)
        self._buffer[BEHIND + start : BEHIND + stop] = new
        self._length = stop
        _insert(self._buffer, self._last, self._before, start, stop)

    def tokens(self) -> NDArray[np.int32]:
        """Return the tokens that are kept."""
        return self._buffer[BEHIND : BEHIND + self._length]

    def places(self, keys: Sequence[int], count: int) -> list[int]:
        """Return up to ``count`` places after the tokens that some text ends with.

        The places of the longest n-gram come first, then those of the next shorter one. For one
        length the latest places come first.

        Args:
            keys: `keys` of that text, this one, or `keys_of` another's last tokens.
            count: how many.

        """
        ending = np.array(keys, dtype=np.int32)
        found: list[int] = _places(
            self._buffer, self._last, self._before, self._length, ending, count
        ).tolist()
        return found

    def windows(self, places: Sequence[int]) -> NDArray[np.int32]:
        """Return [places, BEHIND + AHEAD]: the tokens around each, the place's own at BEHIND."""
        return _windows(self._buffer, np.array(places, dtype=np.int64))

    def ending(self) -> NDArray[np.int32]:
        """Return [BEHIND]: the last tokens."""
        return self._buffer[self._length : self._length + BEHIND]

    def _allocate(self, num_tokens: int) -> None:
        """Allocate an empty index for this many tokens."""
        self._capacity = capacity = max(_FIRST_CAPACITY, 1 << (num_tokens - 1).bit_length())
        self._buffer = np.full(BEHIND + capacity + AHEAD, NO_TOKEN, dtype=np.int32)
        # For each n-gram length: the last place of each hash, and the place before each place. 0:
        # none.
        self._last = np.zeros((len(ORDERS), capacity), dtype=np.int32)
        self._before = np.zeros((len(ORDERS), capacity + 1), dtype=np.int32)


@compiled
def _hash(tokens: NDArray[np.int32], stop: int, order: int, size: int) -> int:
    """Return a hash, below ``size``, a power of two, of the ``order`` tokens that end at a stop."""
    value = 0
    for place in range(stop - order, stop):
        value = (value ^ tokens[place]) * _FACTOR
    return (value >> 32) & (size - 1)


@compiled
def _insert(
    buffer: NDArray[np.int32],
    last: NDArray[np.int32],
    before: NDArray[np.int32],
    start: int,
    stop: int,
) -> None:
    """Add the places after the tokens ``start`` to ``stop - 1`` of a `TextIndex`."""
    for place in range(start + 1, stop + 1):
        for row in range(len(ORDERS)):
            if place >= ORDERS[row]:
                key = _hash(buffer, BEHIND + place, ORDERS[row], last.shape[1])
                before[row, place] = last[row, key]
                last[row, key] = place


@compiled
def _places(
    buffer: NDArray[np.int32],
    last: NDArray[np.int32],
    before: NDArray[np.int32],
    length: int,
    ending: NDArray[np.int32],
    count: int,
) -> Ints:
    """Return what `TextIndex.places` returns."""
    found = np.empty(count, np.int64)
    num_found = 0
    for row in range(len(ORDERS) - 1, -1, -1):
        order = ORDERS[row]
        if order > len(ending):
            continue
        place = last[row, _hash(ending, len(ending), order, last.shape[1])]
        seen = 0
        while place > 0 and seen < count and num_found < count:
            is_place = place < length  # nothing follows the end of the text yet
            for back in range(1, order + 1):
                is_place &= buffer[BEHIND + place - back] == ending[len(ending) - back]
            if is_place:
                seen += 1
                is_new = True
                for other in found[:num_found]:
                    is_new &= other != place
                if is_new:
                    found[num_found] = place
                    num_found += 1
            place = before[row, place]
    return found[:num_found]


@compiled
def _windows(buffer: NDArray[np.int32], places: Ints) -> NDArray[np.int32]:
    """Return what `TextIndex.windows` returns."""
    windows = np.empty((len(places), BEHIND + AHEAD), np.int32)
    for row, place in enumerate(places):
        for column in range(BEHIND + AHEAD):
            windows[row, column] = buffer[place + column]
    return windows


@compiled
def match_lengths(windows: NDArray[np.int32], endings: NDArray[np.int32]) -> Ints:
    """Return [n]: how many tokens before each window's place equal the text's last ones.

    Args:
        windows: [n, BEHIND + AHEAD].
        endings: [n, BEHIND] last tokens of the text that each is compared with.

    """
    lengths = np.zeros(len(windows), np.int64)
    for row in range(len(windows)):
        for place in range(BEHIND - 1, -1, -1):
            token = endings[row, place]
            if token == NO_TOKEN or windows[row, place] != token:
                break
            lengths[row] += 1
    return lengths
