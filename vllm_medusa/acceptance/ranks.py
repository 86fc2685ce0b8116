"""The rank that each head gives the right token, at every position of the target's own texts.

The hidden states are those that vLLM feeds the heads: the target's last ones, after its final norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.acceptance.paths import RANK_CAP, Ranks, loop_start
from vllm_medusa.acceptance.texts import Text
from vllm_medusa.heads import HeadsCheckpoint, MedusaHeads, head_logits
from vllm_medusa.reporting.progress import Progress
from vllm_medusa.target.frozen import FrozenTarget

#: Tokens of one forward pass, with the padding.
_BATCH_TOKENS = 8192
#: Logits that are held at once, over all heads.
_MAX_LOGITS = 2**26


@dataclass(frozen=True)
class Continuation:
    """One continuation, as the statistics see it.

    Attributes:
        prompt_id: of its prompt.
        temperature: that it was sampled at; 0 is greedy.
        ranks: [positions, heads] int16, see `paths`.
        num_before_loop: positions whose drafts all lie before the text begins to loop.

    """

    prompt_id: str
    temperature: float
    ranks: Ranks
    num_before_loop: int


class RankMeter:
    """Runs the target and the heads over texts.

    Args:
        target: in the dtype to compute in.
        checkpoint: the heads.

    """

    def __init__(self, target: FrozenTarget, checkpoint: HeadsCheckpoint) -> None:
        device, dtype = target.weight.device, target.weight.dtype
        self._target = target
        self._device = device
        self._heads = MedusaHeads.from_checkpoint(checkpoint, dtype, device)
        self._num_heads = checkpoint.spec.num_heads
        self._lm_head = {
            name.removeprefix("lm_head."): tensor.to(device, dtype)
            for name, tensor in checkpoint.tensors.items()
            if name.startswith("lm_head.")
        }
        if checkpoint.spec.lm_head == "target":
            self._lm_head = {"weight": target.weight}
        draft_ids = _draft_ids(checkpoint, target.vocab_size)
        self._draft_ids = None if draft_ids is None else draft_ids.to(device)

    @torch.inference_mode()
    def measure(self, texts: Sequence[Text], progress: Progress) -> list[Continuation]:
        """Measure the ranks along the continuation of every text; ``progress`` counts texts."""
        ranks: dict[int, Ranks] = {}
        for batch in _batches(texts):
            hidden = self._hidden_states([texts[index].token_ids for index in batch])
            for row, index in enumerate(batch):
                text = texts[index]
                first = text.num_prompt_tokens - 1
                states = hidden[row, first : first + len(text.continuation) - 1]
                ranks[index] = self._ranks(states, text)
            progress(len(batch))
        return [
            Continuation(
                text.prompt_id,
                text.temperature,
                ranks[index],
                min(len(ranks[index]), max(0, loop_start(text.continuation) - self._num_heads)),
            )
            for index, text in enumerate(texts)
        ]

    def _hidden_states(self, sequences: Sequence[list[int]]) -> Tensor:
        """Return [B, T, H]; what a shorter sequence is padded with comes behind it."""
        length = max(map(len, sequences))
        padded = [tokens + [0] * (length - len(tokens)) for tokens in sequences]
        tokens = torch.tensor(padded, device=self._device)
        return self._target.hidden(tokens, torch.arange(length, device=self._device)[None])

    def _ranks(self, states: Tensor, text: Text) -> Ranks:
        """Return [positions, heads], from the hidden states [n - 1, H] before each token but one.

        Position p's root is token p of the continuation, sampled from state p. Where the limit of
        tokens cut the text short, the last positions' tokens are not known and left out.
        """
        tokens = torch.tensor(text.continuation, device=self._device)
        num_positions = len(tokens) - 1 if text.has_ended else len(tokens) - self._num_heads
        if num_positions < 1:
            return np.zeros((0, self._num_heads), dtype=np.int16)
        unknown = tokens.new_full((self._num_heads,), -1)
        ahead = torch.cat([tokens[1:], unknown]).unfold(0, self._num_heads, 1)
        wanted = ahead[:num_positions].T  # [K, positions]
        if self._draft_ids is not None:
            wanted = torch.where(wanted < 0, wanted, self._draft_ids[wanted.clamp(min=0)])
        parts = []
        rows = self._lm_head["up" if "up" in self._lm_head else "weight"].shape[-2]
        chunk = max(1, _MAX_LOGITS // (self._num_heads * rows))
        for start in range(0, num_positions, chunk):
            stop = min(start + chunk, num_positions)
            logits = head_logits(self._heads(states[start:stop]), **self._lm_head)
            parts.append(_rank_of(logits, wanted[:, start:stop]))
        return torch.cat(parts, dim=1).T.to("cpu", torch.int16).numpy()


def _rank_of(logits: Tensor, wanted: Tensor) -> Tensor:
    """Tokens ranked above the wanted one, at most `RANK_CAP`: [K, B, V], [K, B] -> [K, B].

    Wanted tokens below 0 are unknown: misses.
    """
    value = logits.gather(-1, wanted.clamp(min=0).unsqueeze(-1))
    ranks = (logits > value).sum(dim=-1).clamp(max=RANK_CAP)
    return torch.where(wanted < 0, RANK_CAP, ranks)


def _draft_ids(checkpoint: HeadsCheckpoint, vocab_size: int) -> Tensor | None:
    """Row of the lm_heads of each token of the target, -1 for none; None if all have their own."""
    token_map = checkpoint.tensors.get("token_map")
    if token_map is None:
        return None
    draft_ids = torch.full((vocab_size,), -1, dtype=torch.int64)
    draft_ids[token_map] = torch.arange(len(token_map))
    return draft_ids


def _batches(texts: Sequence[Text]) -> Iterator[list[int]]:
    """Indices of texts of similar length, of `_BATCH_TOKENS` at most where there are several."""
    batch: list[int] = []
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].token_ids))
    for index in order:
        if batch and (len(batch) + 1) * len(texts[index].token_ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
