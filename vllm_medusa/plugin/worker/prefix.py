"""The prefix attention of the heads in an engine: its layer, and its memory of the requests' texts.

A runner keeps what each step has verified and then asks for the state that the heads read. Keeping
takes one small product; the rest runs only where heads run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_medusa.heads.prefix import PrefixAttention, PrefixWindow
from vllm_medusa.heads.prefix_memory import PrefixMemory


class PrefixPlaces(NamedTuple):
    """The last verified positions of B requests, which are kept already.

    Attributes:
        places: [B] int64, the requests' in the memory.
        positions: [B] int64.

    """

    places: Tensor
    positions: Tensor


class PrefixContext:
    """The layer with a place in its memory for each of R requests.

    Args:
        layer: of the heads.
        embed: from tokens [N] to the target's embeddings [N, E].
        vocab_size: number of tokens that have one.
        num_requests: R.

    """

    def __init__(
        self,
        layer: PrefixAttention,
        embed: Callable[[Tensor], Tensor],
        vocab_size: int,
        num_requests: int,
    ) -> None:
        self._layer = layer.requires_grad_(False)
        self._embed = embed
        self._vocab_size = vocab_size
        self._memory = PrefixMemory.make(layer, num_requests)

    @property
    def window(self) -> int:
        """W, positions that the layer reads."""
        return self._layer.window

    @property
    def nowhere(self) -> int:
        """The place for what is not to be kept."""
        return self._memory.nowhere

    def forget(self, place: int) -> None:
        """Empty a place, for a request that begins or is computed again."""
        self._memory.forget(place)

    @torch.inference_mode()
    def keep(self, hidden: Tensor, following: Tensor, places: Tensor, positions: Tensor) -> None:
        """Keep T verified positions.

        Args:
            hidden: [T, H] the target's final hidden states.
            following: [T] int64, the token after each.
            places: [T] int64, as `PrefixMemory.keep` wants them.
            positions: [T] int64.

        """
        # Placeholders of images and the like may lie outside the vocabulary.
        known = following.clamp(0, self._vocab_size - 1)
        keys, values = self._layer.keys_and_values(hidden, self._embed(known))
        self._memory.keep(places, positions, keys, values)

    def rehearse(self, hidden: Tensor, roots: Tensor) -> PrefixPlaces:
        """Keep positions of no request, as a step does, and return them; for who times it.

        Args:
            hidden: [B, H].
            roots: [B] int64.

        """
        where = PrefixPlaces(torch.full_like(roots, self.nowhere), torch.zeros_like(roots))
        self.keep(hidden, roots, *where)
        return where

    def windows(self, where: PrefixPlaces) -> PrefixWindow:
        """Return what is read at the last verified position of B requests."""
        return self._memory.windows(*where)

    def at(self, hidden: Tensor, roots: Tensor, where: PrefixPlaces) -> Tensor:
        """Return what the heads read at the last verified position of B requests.

        Args:
            hidden: [B, H] the target's final hidden states there.
            roots: [B] int64, the tokens after it.
            where: the positions.

        Returns:
            [B, H]

        """
        queries, windows = self._layer.queries(hidden, self._embed(roots)), self.windows(where)
        bias = self._layer.bias_by_distance(windows, 0).to(queries.dtype)
        return self._layer.read(hidden, queries, windows, bias)
