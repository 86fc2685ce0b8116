"""The rows of a step that the prefix attention keeps: what the step has verified of each text.

The same as `v1.prefix_rows`, on the device. A request's place in the memory is its state index.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.plugin.worker.prefix import PrefixContext


def keep_rows(
    context: PrefixContext,
    input_batch: Any,
    hidden_states: Tensor,
    path: Tensor,
    following_path: Tensor,
) -> Tensor:
    """Keep what a step has verified; return the last position of each of its B requests, [B].

    Args:
        context: the layer and its memory.
        input_batch: the step's batch; positions are those of the trees.
        hidden_states: [at least T, H] of all the step's tokens.
        path: [B, D + 1] accepted nodes of each tree; the last one is repeated.
        following_path: [B] the token after each path: sampled, or the next of a prompt.

    """
    first_row = input_batch.cu_num_logits[:-1, None]
    rows = input_batch.logits_indices[first_row + path].long()
    positions = input_batch.positions[rows]
    following = torch.cat((input_batch.input_ids[rows[:, 1:]], following_path[:, None]), dim=1)
    is_last = positions == positions[:, -1:]
    following = torch.where(is_last, following_path[:, None], following)
    last = positions[:, -1]
    is_kept = positions > last[:, None] - context.window
    parts = [(rows, positions, following, is_kept)]
    num_logits = np.diff(input_batch.cu_num_logits_np)
    if (input_batch.num_scheduled_tokens > num_logits).any():
        parts.append(_before(input_batch, rows[:, :1], context.window))
    rows, positions, following, is_kept = (
        torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)
    )
    places = torch.where(is_kept, input_batch.idx_mapping[:, None], context.nowhere)
    context.keep(
        hidden_states[rows.flatten()],
        following.flatten().long(),
        places.flatten().long(),
        positions.flatten(),
    )
    return last


def _before(
    input_batch: Any, root_rows: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tokens of a prompt before each root, at most a window's.

    Returns:
        [B, W - 1] rows, positions, tokens after them, and whether a row is one of these tokens.

    """
    back = torch.arange(window - 1, 0, -1, device=root_rows.device)
    rows = root_rows - back
    is_there = rows >= input_batch.query_start_loc[: len(rows), None]
    rows = rows.clamp(min=0)
    return rows, input_batch.positions[rows], input_batch.input_ids[rows + 1], is_there
