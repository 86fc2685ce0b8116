"""Drafts that are right up to a random node, and wrong everywhere else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests import tiny


class Oracle:
    """Stands in for the heads' drafts, so that every node is accepted sooner or later.

    Args:
        seed: of the choice of nodes.

    Attributes:
        chosen: nodes that were drafted up to, which a right engine accepts.

    """

    def __init__(self, seed: int = 0) -> None:
        self._futures: list[tuple[list[int], list[int]]] = []
        self._rng = random.Random(seed)
        self.chosen: set[int] = set()

    def expect(self, prompts: list[Any], futures: list[list[int]]) -> None:
        """Know the tokens that the target continues each prompt with."""
        self._futures = [
            (prompt["prompt_token_ids"], future)
            for prompt, future in zip(prompts, futures, strict=True)
        ]

    def draft(self, states: Any, index: list[int], paths: list[tuple[int, ...]]) -> list[list[int]]:
        return [self._row(states, state, paths) for state in index]

    def _row(self, states: Any, state: int, paths: list[tuple[int, ...]]) -> list[int]:
        text = states.all_token_ids.gpu[state][: int(states.total_len.gpu[state])].tolist()
        future = self._future(text)
        choices = [i for i, path in enumerate(paths, 1) if len(path) <= len(future)]
        node = self._rng.choice([0, *choices])
        goal = paths[node - 1] if node else ()
        self.chosen.add(node)
        row = []
        for path in paths:
            right = future[len(path) - 1] if len(path) <= len(future) else None
            row.append(right if path == goal[: len(path)] else self._wrong(right))
        return row

    def _future(self, text: list[int]) -> list[int]:
        for prompt, tokens in self._futures:
            if text == [*prompt, *tokens][: len(text)] and len(text) >= len(prompt):
                return tokens[len(text) - len(prompt) :]
        return []

    def _wrong(self, right: int | None) -> int:
        while (token := self._rng.randrange(tiny.VOCAB_SIZE - 1)) == right:
            pass
        return token


@contextmanager
def oracle(
    prompts: Sequence[Any] = (), futures: Sequence[list[int]] = (), seed: int = 0
) -> Iterator[Oracle]:
    """Let engines of this process draft with an oracle."""
    from vllm_medusa.plugin.worker.v2 import speculator

    stand_in = Oracle(seed)
    stand_in.expect(list(prompts), list(futures))
    original = speculator.TreeSpeculator.propose
    states: list[Any] = []
    original_init = speculator.TreeSpeculator.__init__

    def init(self: Any, vllm_config: Any, device: Any, req_states: Any) -> None:
        states.append(req_states)
        original_init(self, vllm_config, device, req_states)

    def propose(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = original(self, input_batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            return tokens
        index = input_batch.idx_mapping.tolist()
        rows = stand_in.draft(states[-1], index, list(self.tree.paths))
        return torch.tensor(rows, dtype=tokens.dtype, device=tokens.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator.TreeSpeculator, "propose", propose)
        patch.setattr(speculator.TreeSpeculator, "__init__", init)
        yield stand_in
