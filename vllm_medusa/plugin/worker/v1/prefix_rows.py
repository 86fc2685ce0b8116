"""The rows of a step that the prefix attention keeps: what the step has verified of each text.

These are the last tokens of a prompt or its chunk, and the accepted path of a tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_medusa.plugin.worker.prefix import PrefixContext, PrefixPlaces
from vllm_medusa.plugin.worker.v1.step import Step
from vllm_medusa.tree.step_trees import IntArray


class PrefixRows:
    """Keeps the texts of all requests that run.

    Args:
        context: the layer and its memory.

    """

    def __init__(self, context: PrefixContext) -> None:
        self._context = context
        self._free = list(range(context.nowhere))[::-1]
        self._places: dict[str, int] = {}

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop the texts of requests that have ended or will be computed again."""
        for req_id in req_ids:
            place = self._places.pop(req_id, None)
            if place is not None:
                self._free.append(place)

    def keep(
        self,
        step: Step,
        sampled: Sequence[Sequence[int]],
        token_ids: NDArray[np.int32],
        hidden_states: Tensor,
        path: Tensor,
    ) -> PrefixPlaces:
        """Keep what a step has verified, and return where the texts end, on the host.

        Args:
            step: the step, of B requests.
            sampled: tokens that each request got; none for a chunk of a prompt.
            token_ids: [at least B, positions] the texts; with the sampled tokens.
            hidden_states: [at least T, H] of all the step's tokens.
            path: [B, D + 1] accepted nodes of each tree (`Acceptance`).

        """
        requests = np.arange(len(step.req_ids))
        num_drafts = np.array([len(drafts) for drafts in step.drafts], dtype=np.int64)
        lengths = np.array([max(len(tokens) - 1, 0) for tokens in sampled], dtype=np.int64)
        root_rows = step.num_tokens.cumsum() - num_drafts - 1
        root_positions = step.num_computed + step.num_tokens - num_drafts - 1
        last = root_positions + lengths

        # No deeper than any tree was accepted.
        path = path[:, : 1 + lengths.max(initial=0)]
        depths = np.minimum(np.arange(path.shape[1]), lengths[:, None])
        before, back = _tokens_before(root_positions - step.num_computed, self._context.window)
        owners = np.concatenate((before, requests.repeat(path.shape[1])))
        positions = np.concatenate(
            (root_positions[before] - back, (root_positions[:, None] + depths).ravel())
        )
        device = hidden_states.device
        nodes = torch.from_numpy(root_rows).to(device)[:, None] + path
        rows = torch.cat((torch.from_numpy(root_rows[before] - back).to(device), nodes.flatten()))
        places = self._places_of(step.req_ids)
        is_kept = positions > last[owners] - self._context.window
        following = token_ids[owners, positions + 1].astype(np.int64)
        kept_at = np.where(is_kept, places[owners], self._context.nowhere)
        self._context.keep(
            hidden_states[rows],
            *(torch.from_numpy(array).to(device) for array in (following, kept_at, positions)),
        )
        return PrefixPlaces(torch.from_numpy(places), torch.from_numpy(last))

    def _places_of(self, req_ids: Sequence[str]) -> IntArray:
        """Return [B] the requests' places; those that begin get empty ones."""
        new = [req_id for req_id in req_ids if req_id not in self._places]
        if len(new) > len(self._free):
            # Sessions that wait for input hold places too; they are emptied when they go on.
            running = set(req_ids)
            waiting = [req_id for req_id in self._places if req_id not in running]
            self.forget(waiting[: len(new) - len(self._free)])
        for req_id in new:
            place = self._places[req_id] = self._free.pop()
            self._context.forget(place)
        return np.array([self._places[req_id] for req_id in req_ids], dtype=np.int64)


def _tokens_before(counts: IntArray, window: int) -> tuple[IntArray, IntArray]:
    """Name the tokens of a step before each root, at most a window's.

    Args:
        counts: [B] how many there are.
        window: W.

    Returns:
        [T] the request of each, and how far before its root it is.

    """
    counts = np.minimum(counts, window - 1)
    owners = np.arange(len(counts)).repeat(counts)
    return owners, (counts.cumsum()[owners] - np.arange(len(owners))).astype(np.int64)
