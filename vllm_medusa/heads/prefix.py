"""Prefix attention: a layer before the heads that looks back at the last tokens of the text.

A target's final hidden state is made for the next token; heads that read it alone know little of
what comes after. This layer adds to it what it finds at the last W positions of the text, in the
hidden states there and in the tokens that followed them: at position t it reads the hidden state of
t and the target's embedding of token t + 1. Hydra++ has such a layer (arXiv 2402.05109:
prefix attention), and EAGLE reads the same pairs (arXiv 2401.15077).

A window in place of the whole text bounds the memory of a request (`prefix_memory`). Distances
count through a learned bias for each one, so that keys do not depend on their position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6


#: From rows [..., in] and a matrix [out, in] to [..., out]. An engine has faster ones than
#: ``F.linear`` for matrices that do not change.
Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Drafted(NamedTuple):
    """What N drafts of m tokens hold, the first token first, the last one that of the query itself.

    Attributes:
        keys: [N, m, A, d]; along whole texts [B, S, m, A, d].
        values: as the keys.
    """

    keys: Tensor
    values: Tensor


class PrefixAttention(nn.Module):
    """Attention of A attention heads of size d over a window of W positions.

    A new layer passes the hidden states through unchanged.

    Args:
        hidden_size: H, of the target's final hidden states.
        embedding_size: E, of the target's token embeddings.
        window: W, with the position itself.
        num_attention_heads: A.
        head_size: d.
        dtype: of the parameters.
        device: of the parameters.

    Attributes:
        product: multiplies by the matrices.
    """

    def __init__(
        self,
        hidden_size: int,
        embedding_size: int,
        window: int,
        num_attention_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        width = num_attention_heads * head_size
        input_size = hidden_size + embedding_size
        # Those of queries, keys and values in one, because a product of all three is faster.
        self.projection = zeros(3, width, input_size)
        self.output = zeros(hidden_size, width)
        self.bias = zeros(num_attention_heads, window)
        self.head_shape = (num_attention_heads, head_size)
        self.product: Product = F.linear

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> PrefixAttention:
        """Build a layer of canonical tensors (`HeadsCheckpoint`), converted to `dtype`."""
        num_heads, window = tensors["prefix.bias"].shape
        width, input_size = tensors["prefix.query"].shape
        hidden_size = len(tensors["prefix.output"])
        layer = cls(
            *(hidden_size, input_size - hidden_size, window, num_heads, width // num_heads),
            dtype=dtype,
            device=device,
        )
        with torch.no_grad():
            layer.projection[0] = tensors["prefix.query"]
            layer.projection[1:] = tensors["prefix.key_value"]
            layer.output.copy_(tensors["prefix.output"])
            layer.bias.copy_(tensors["prefix.bias"])
        return layer

    @property
    def window(self) -> int:
        """W."""
        return self.bias.shape[1]

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The parameters that are matrices or stacks of them [..., out, in]."""
        return [self.projection, self.output]

    @property
    def biases(self) -> list[nn.Parameter]:
        """The other parameters."""
        return [self.bias]

    def canonical_tensors(self) -> dict[str, Tensor]:
        """Return the parameters under the names of `HeadsCheckpoint`."""
        return {
            "prefix.query": self.projection.detach()[0],
            "prefix.key_value": self.projection.detach()[1:],
            "prefix.output": self.output.detach(),
            "prefix.bias": self.bias.detach(),
        }

    def along(self, hidden: Tensor, following: Tensor, position_ids: Tensor) -> Tensor:
        """Run the layer along whole texts.

        Args:
            hidden: [B, S, H].
            following: [B, S, E], the target's embedding of the token after each.
            position_ids: [B, S] or [1, S] int64, from 0 in every text; rows may hold several texts.

        Returns:
            [B, S, H]
        """
        return self.read_texts(hidden, following, self.texts(hidden, following, position_ids))

    def texts(self, hidden: Tensor, following: Tensor, position_ids: Tensor) -> PrefixWindow:
        """Return what each position of whole texts reads, in n blocks of W positions.

        A block reads itself and the block before it.

        Args:
            hidden: as for `along`.
            following: as for `along`.
            position_ids: as for `along`.
        """
        window, batch = self.window, len(hidden)

        def with_last(rows: Tensor) -> Tensor:
            """[B, n, A, W, d] to [B, n, A, 2 W, d]: the block before comes first."""
            before = F.pad(rows, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
            return torch.cat((before, rows), dim=3)

        places = torch.arange(2 * window, device=hidden.device)
        distance = places[window:, None] - places
        # A text begins at position 0, so nothing before it is nearer than this.
        positions = F.pad(position_ids, (0, -position_ids.shape[1] % window)).expand(batch, -1)
        reach = positions.reshape(batch, -1, window, 1)
        keys, values = self.keys_and_values(hidden, following)
        return PrefixWindow(
            with_last(self._in_blocks(keys)),
            with_last(self._in_blocks(values)),
            distance,
            (distance >= 0) & (distance <= reach),
        )

    def read_texts(
        self,
        states: Tensor,
        following: Tensor,
        texts: PrefixWindow,
        drafted: Drafted | None = None,
    ) -> Tensor:
        """Run the layer along whole texts, or along drafts that go on from each position.

        Args:
            states: [B, S, H].
            following: [B, S, E].
            texts: of `texts`.
            drafted: of the drafts.

        Returns:
            [B, S, H]
        """
        queries = self._in_blocks(self.queries(states, following))
        ahead = 0 if drafted is None else drafted.keys.shape[2]
        bias = self.bias_by_distance(texts, ahead).to(queries.dtype)
        attended = self._attend_along(queries, texts, bias, drafted)
        rows = attended.transpose(2, 3).reshape(len(states), -1, self.output.shape[1])
        return states + self.product(rows[:, : states.shape[1]], self.output)

    def keys_and_values(self, hidden: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Return what other positions read of these, and a `PrefixMemory` keeps.

        Args:
            hidden: [..., H].
            following: [..., E], the target's embedding of the token after each.

        Returns:
            [..., A, d] and [..., A, d]
        """
        keys, values = self._projected(hidden, following, self.projection[1:])
        return keys, values

    def queries(self, states: Tensor, following: Tensor) -> Tensor:
        """Return [..., A, d] of states [..., H] and the embeddings [..., E] after them."""
        (queries,) = self._projected(states, following, self.projection[:1])
        return queries

    def queries_keys_and_values(
        self, states: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all three, each [..., A, d]."""
        queries, keys, values = self._projected(states, following, self.projection)
        return queries, keys, values

    def _projected(self, states: Tensor, following: Tensor, matrices: Tensor) -> tuple[Tensor, ...]:
        """[..., A, d] for each of n matrices [n, A d, H + E]."""
        rows = self.product(_mixed(states, following), matrices.flatten(0, 1))
        return rows.view(*rows.shape[:-1], len(matrices), *self.head_shape).unbind(-3)

    def read(
        self,
        states: Tensor,
        queries: Tensor,
        windows: PrefixWindow,
        bias: Tensor,
        drafted: Drafted | None = None,
    ) -> Tensor:
        """Run the layer at one position of each of B texts, or for drafts that go on from there.

        Args:
            states: [N, H], as many for each text, in their order.
            queries: [N, A, d], of `queries`.
            windows: of `PrefixMemory.windows`.
            bias: [B, A, 1, M], of `bias_by_distance`, for drafts of as many tokens.
            drafted: of the drafts.

        Returns:
            [N, H]
        """
        num_texts, keys, values = len(windows.keys), windows.keys, windows.values

        def by_text(rows: Tensor) -> Tensor:
            """[N, ..., A, d] to [B, A, N / B ..., d]."""
            return rows.reshape(num_texts, -1, *self.head_shape).transpose(1, 2)

        if drafted is not None:
            num_paths, num_tokens = len(states) // num_texts, drafted.keys.shape[1]
            own = self._bias_of_drafts(num_paths, num_tokens).expand(num_texts, -1, -1, -1)
            bias = torch.cat((bias.expand(-1, -1, num_paths, -1), own), dim=-1)
            keys = torch.cat((keys, by_text(drafted.keys)), dim=2)
            values = torch.cat((values, by_text(drafted.values)), dim=2)
        attended = F.scaled_dot_product_attention(by_text(queries), keys, values, attn_mask=bias)
        rows = attended.transpose(1, 2).reshape(len(states), -1)
        return states + self.product(rows, self.output)

    def _bias_of_drafts(self, num_paths: int, num_tokens: int) -> Tensor:
        """[A, n, n m]: each of n paths reads its own m tokens only, as far as the window goes."""
        too_far = max(0, num_tokens - self.window)
        bias = F.pad(self.bias[:, :num_tokens].flip(-1), (too_far, 0), value=-torch.inf)
        is_own = torch.eye(num_paths, dtype=torch.bool, device=bias.device)[..., None]
        return torch.where(is_own, bias[:, None, None], -torch.inf).flatten(2)

    def bias_by_distance(self, read: PrefixWindow, ahead: int | Tensor) -> Tensor:
        """Return what the distances add to the scores; minus infinity where nothing is read.

        Args:
            read: the texts.
            ahead: tokens of a draft between its query and the text; [K, 1, 1, 1] for several.

        Returns:
            [..., A, n, M]; for several [K, ..., A, n, M]
        """
        distance = read.distance + ahead
        is_seen = read.is_seen & (distance < self.window)
        bias = self.bias[:, distance.clamp(0, self.window - 1)].movedim(0, -3)
        return bias.masked_fill(~is_seen.unsqueeze(-3), -torch.inf)

    def _in_blocks(self, rows: Tensor) -> Tensor:
        """[B, S, A, d] to [B, S / W, A, W, d]."""
        rows = F.pad(rows, (0, 0, 0, 0, 0, -rows.shape[1] % self.window))
        return rows.view(len(rows), -1, self.window, *self.head_shape).transpose(2, 3)

    def _attend_along(
        self, queries: Tensor, texts: PrefixWindow, bias: Tensor, drafted: Drafted | None
    ) -> Tensor:
        """[B, n, A, W, d] that each position finds, in its text and in its own draft.

        Args:
            queries: [B, n, A, W, d].
            texts: as for `read_texts`.
            bias: of `bias_by_distance`.
            drafted: as for `read_texts`.

        """
        if drafted is None:
            return F.scaled_dot_product_attention(queries, texts.keys, texts.values, attn_mask=bias)
        # Tokens of the draft that are a window away or further are not read.
        keys, values = (
            torch.stack([self._in_blocks(rows) for rows in part[:, :, -self.window :].unbind(2)])
            for part in drafted
        )
        near = len(keys)
        queries = queries * queries.shape[-1] ** -0.5
        near_scores = torch.linalg.vecdot(queries, keys).movedim(0, -1)
        near_scores = near_scores + self.bias[:, None, :near].flip(-1)
        scores = queries @ texts.keys.mT + bias
        scores = torch.cat((scores, near_scores.to(scores.dtype)), dim=-1)
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=exact).to(values.dtype)
        of_text, of_drafts = weights[..., :-near], weights[..., -near:].movedim(-1, 0)
        found: Tensor = of_text @ texts.values + (of_drafts.unsqueeze(-1) * values).sum(dim=0)
        return found


def _mixed(hidden: Tensor, following: Tensor) -> Tensor:
    """[..., H] and [..., E] to [..., H + E]."""
    return torch.cat((normalised(hidden), normalised(following.to(hidden.dtype))), dim=-1)


def normalised(rows: Tensor) -> Tensor:
    """Divide rows [..., n] by their root mean squares."""
    return F.rms_norm(rows, rows.shape[-1:], eps=_EPS)


@dataclass(frozen=True)
class PrefixWindow:
    """Positions of texts that n queries of each read.

    Attributes:
        keys: [..., A, M, d].
        values: [..., A, M, d].
        distance: [..., n, M] int64, from each position to the query's.
        is_seen: [..., n, M], whether the query can read the position; if it is in the window.
    """

    keys: Tensor
    values: Tensor
    distance: Tensor
    is_seen: Tensor
