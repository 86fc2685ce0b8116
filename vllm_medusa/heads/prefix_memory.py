"""The memory of a prefix attention: a ring of W keys and values for each text.

It holds positions that the target has verified, so nothing of it is ever undone. Positions that the
engine did not compute (those of a cached prefix) are missing in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_medusa.heads.prefix import PrefixAttention, PrefixWindow

#: Position of an entry that holds nothing: so far back that no window reaches it.
_NOTHING = -(2**62)


@dataclass(frozen=True)
class PrefixMemory:
    """Keys and values of the last W positions of up to R texts, a ring for each.

    Position p lies in entry p mod W. One place more, the last one, takes what is not to be kept.

    Attributes:
        keys: [R + 1, W, A, d].
        values: [R + 1, W, A, d].
        positions: [R + 1, W] int64, the position that each entry holds, or `_NOTHING`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @classmethod
    def make(cls, layer: PrefixAttention, num_texts: int) -> PrefixMemory:
        """Allocate for as many texts, on the layer's device and in its dtype."""
        like = layer.projection
        shape = (num_texts + 1, layer.window)
        return cls(
            like.new_zeros(*shape, *layer.head_shape),
            like.new_zeros(*shape, *layer.head_shape),
            torch.full(shape, _NOTHING, dtype=torch.int64, device=like.device),
        )

    @property
    def nowhere(self) -> int:
        """The place for what is not to be kept."""
        return len(self.positions) - 1

    def windows(self, places: Tensor, positions: Tensor) -> PrefixWindow:
        """Return what is read at one position of each of B texts, which is kept already.

        Args:
            places: [B] int64.
            positions: [B] int64.
        """
        distance = (positions[:, None] - self.positions[places])[:, None]
        # Contiguous, because heads that run in turn read them several times.
        keys, values = (
            part[places].transpose(1, 2).contiguous() for part in (self.keys, self.values)
        )
        return PrefixWindow(keys, values, distance, distance >= 0)

    def forget(self, place: int) -> None:
        """Empty a place, for a text that begins or is computed again."""
        self.positions[place] = _NOTHING

    def keep(self, places: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep T positions.

        Args:
            places: [T] int64. Of each place, at most W positions in a row; the same position may
                come twice with the same keys and values.
            positions: [T] int64.
            keys: [T, A, d].
            values: [T, A, d].
        """
        entries = positions % self.positions.shape[1]
        self.keys[places, entries] = keys
        self.values[places, entries] = values
        self.positions[places, entries] = positions
