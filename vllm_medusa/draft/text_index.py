"""Where the last tokens of a text stood before: an index that grows with the text.

For n-grams of a few lengths it knows the last place of each, and from each place the one before
(chains of equal hashes, as in LZ77). Adding a token costs the same whatever the text's length, and
so does looking up. A token costs about 0.4 KiB of memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from vllm_medusa.draft.types import Ints

#: Lengths of the n-grams that are looked up. Each is twice the one before: see `NgramKeys`.
ORDERS = (1, 2, 4, 8)
#: Tokens before a place that `TextIndex.windows` shows: longer matches count as that long.
BEHIND = 16
#: Tokens from a place on that it shows.
AHEAD = 32
#: What a window holds where there is no token.
NO_TOKEN = -1
_FIRST_CAPACITY = 256


class NgramKeys:
    """Hashes of the n-grams in which a growing text ends, by `ORDERS`."""

    def __init__(self) -> None:
        # Of each order but the last: its hashes at the last places, as far back as they are read.
        self._recent = [deque([NO_TOKEN] * order, maxlen=order) for order in ORDERS[:-1]]

    def add(self, token: int) -> list[int]:
        """Add a token; return the keys: each the hash of its two halves'."""
        key = token
        keys = [key]
        for recent in self._recent:
            half = recent[0]
            recent.append(key)
            key = hash((half, key))
            keys.append(key)
        return keys


def keys_of(tokens: Sequence[int]) -> list[int]:
    """Return the keys of the n-grams in which tokens end, none longer than they are."""
    ngrams, keys = NgramKeys(), [0]
    for token in tokens[-ORDERS[-1] :]:
        keys = ngrams.add(token)
    return keys[: bisect_right(ORDERS, len(tokens))]


class TextIndex:
    """The places of all n-grams of one text.

    A *place* is the index of the token that followed an n-gram.

    Args:
        max_tokens: of a text that grows beyond, the older half is forgotten.

    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        #: Tokens that were ever added.
        self.num_added = 0
        #: Hashes of the n-grams in which the text ends, by `ORDERS`.
        self.keys = [0] * len(ORDERS)
        self._ngrams = NgramKeys()
        self._last: list[dict[int, int]] = []
        self._before: list[array[int]] = []
        self._clear()

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the end of the text."""
        self.num_added += len(tokens)
        if self._length + len(tokens) > self._max_tokens:
            kept = [*self.tokens().tolist(), *tokens][-(self._max_tokens // 2) :]
            self._clear()
            tokens = kept
        self._write(tokens)
        for token in tokens:
            self._length += 1
            self.keys = self._ngrams.add(token)
            for key, last, before in zip(self.keys, self._last, self._before, strict=True):
                before.append(last.get(key, 0))
                last[key] = self._length

    def tokens(self) -> NDArray[np.int32]:
        """Return the tokens that are kept."""
        return self._buffer[BEHIND : BEHIND + self._length]

    def places(self, keys: Sequence[int], count: int) -> list[int]:
        """Return up to ``count`` places behind what some text ends in.

        Those of the longest n-gram come first, then those of the next shorter one, and of one
        length the latest.

        Args:
            keys: `keys` of that text, this one, or `keys_of` another's last tokens.
            count: how many.

        """
        found: list[int] = []
        by_order = zip(keys, self._last, self._before, strict=False)
        for key, last, before in reversed(list(by_order)):
            place = last.get(key, 0)
            seen = 0
            while place and seen < count and len(found) < count:
                # Nothing has followed the text's own end yet.
                if place < self._length:
                    seen += 1
                    if place not in found:
                        found.append(place)
                place = before[place]
        return found

    def windows(self, places: Sequence[int]) -> NDArray[np.int32]:
        """Return [places, BEHIND + AHEAD]: the tokens around each, the place's own at BEHIND."""
        windows: NDArray[np.int32] = self._windows[np.array(places, dtype=np.intp)]
        return windows

    def ending(self) -> NDArray[np.int32]:
        """Return [BEHIND]: the last tokens."""
        return self._buffer[self._length : self._length + BEHIND]

    def _clear(self) -> None:
        self._length = 0
        self.keys = [0] * len(ORDERS)
        self._ngrams = NgramKeys()
        self._last = [{} for _ in ORDERS]
        # Place 0 ends every chain.
        self._before = [array("i", [0]) for _ in ORDERS]
        self._allocate(_FIRST_CAPACITY)

    def _allocate(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffer = np.full(BEHIND + capacity + AHEAD, NO_TOKEN, dtype=np.int32)
        self._windows = sliding_window_view(self._buffer, BEHIND + AHEAD)

    def _write(self, tokens: Sequence[int]) -> None:
        stop = self._length + len(tokens)
        if stop > self._capacity:
            before = self.tokens()
            self._allocate(max(stop, 2 * self._capacity))
            self._buffer[BEHIND : BEHIND + len(before)] = before
        self._buffer[BEHIND + self._length : BEHIND + stop] = tokens


def match_lengths(windows: NDArray[np.int32], endings: NDArray[np.int32]) -> Ints:
    """Return [n]: how many tokens before each window's place equal the text's last ones.

    Args:
        windows: [n, BEHIND + AHEAD].
        endings: [n, BEHIND] last tokens of the text that each is compared with.

    """
    behind = windows[:, BEHIND - 1 :: -1]
    last = endings[:, ::-1]
    differs = np.ones((len(windows), BEHIND + 1), dtype=np.bool_)
    np.not_equal(behind, last, out=differs[:, :BEHIND])
    differs[:, :BEHIND] |= last == NO_TOKEN
    lengths: Ints = differs.argmax(axis=1)
    return lengths
