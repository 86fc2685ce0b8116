"""Guesses of dynamic trees, in place of the heads': the right token has a random rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.oracles import best_first as slow
from tests.v2.oracle import Oracle

RankPath = slow.RankPath


class Guesser:
    """Stands in for the heads; how likely its guesses are is random too.

    Args:
        tables: which table of guesses each rank path has.

    Attributes:
        shapes: parents of all trees that were drafted.

    """

    def __init__(
        self,
        prompts: list[Any],
        futures: list[list[int]],
        tables: Callable[[list[RankPath]], slow.Tables],
    ) -> None:
        self._oracle = Oracle()
        self._oracle.expect(prompts, futures)
        self._tables = tables
        self._rng = random.Random(0)
        self.shapes: set[tuple[int, ...]] = set()

    def paths_of(self, speculator: Any) -> slow.Tables:
        """The rank paths that an engine's trees are chosen from."""
        return self._tables(speculator.proposer.superset().paths())

    def guess(
        self, req_states: Any, index: list[int], paths: slow.Tables, num_guesses: int
    ) -> tuple[Tensor, Tensor]:
        """Return [T, B, k] log-probabilities and tokens."""
        shape = 1 + max(paths.values()), len(index), num_guesses
        log_probs, tokens = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
        for req, state in enumerate(index):
            text = req_states.all_token_ids.gpu[state][: int(req_states.total_len.gpu[state])]
            future = self._oracle._future(text.tolist())
            tokens[:, req] = torch.tensor(self._rows(future, paths, num_guesses))
            weights = [self._weights(num_guesses) for _ in range(shape[0])]
            log_probs[:, req] = torch.tensor(weights).log()
        return log_probs, tokens

    def _weights(self, size: int) -> list[float]:
        weights = sorted((self._rng.random() ** 4 for _ in range(size)), reverse=True)
        return [weight / sum(weights) for weight in weights]

    def _rows(self, future: list[int], paths: slow.Tables, num_guesses: int) -> list[list[int]]:
        """Each table's tokens: below a right path the next right one is among the first three."""
        rows: list[list[int]] = []
        right: set[RankPath] = {()}
        for table in range(1 + max(paths.values())):
            read_here = [path for path in paths if paths[path] == table]
            depth = len(read_here[0]) - 1
            below_right = [path for path in read_here if path[:-1] in right]
            row = self._rng.sample(range(tiny.VOCAB_SIZE - 1), num_guesses)
            if below_right and depth < len(future):
                if future[depth] in row:
                    row.remove(future[depth])
                row.insert(self._rng.choice([0, 0, 1, 2]), future[depth])
                row = row[:num_guesses]
                right |= {path for path in below_right if row[path[-1]] == future[depth]}
            rows.append(row)
        return rows

    def check(
        self,
        speculator: Any,
        index: list[int],
        paths: slow.Tables,
        drafts: Tensor,
        *guesses: Tensor,
    ) -> None:
        """Compare the trees that requests of state indices got with the slow ones."""
        num_nodes = speculator.num_nodes
        for req, state in enumerate(index):
            log_probs, tokens = (values[:, req].numpy() for values in guesses)
            chosen = [path for path, _ in slow.grow(paths, log_probs, num_nodes)]
            parents = speculator.states.parents[state].tolist()
            wanted = slow.as_nodes(chosen, paths, tokens, num_nodes)
            assert (parents, drafts[req].tolist()) == wanted
            self.shapes.add(tuple(parents))


@contextmanager
def guesser(
    prompts: list[Any],
    futures: list[list[int]],
    tables: Callable[[list[RankPath]], slow.Tables] = slow.by_head,
) -> Iterator[Guesser]:
    """Have engines of this process draft with a guesser's guesses, each tree compared."""
    from vllm_medusa.plugin.worker.v2 import speculator

    stand_in = Guesser(prompts, futures, tables)
    original_init = speculator.TreeSpeculator.__init__
    original = speculator.TreeSpeculator.propose

    def init(self: Any, vllm_config: Any, device: Any, req_states: Any) -> None:
        original_init(self, vllm_config, device, req_states)
        self.req_states = req_states

    def propose(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):
            return original(self, input_batch, *args, **kwargs)
        index, paths = input_batch.idx_mapping.tolist(), stand_in.paths_of(self)
        top_k = self.proposer.config.tree.top_k
        guesses = stand_in.guess(self.req_states, index, paths, top_k)
        self.proposer.probable_guesses = lambda *_: guesses
        tokens = original(self, input_batch, *args, **kwargs)
        stand_in.check(self, index, paths, tokens, *guesses)
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator.TreeSpeculator, "__init__", init)
        patch.setattr(speculator.TreeSpeculator, "propose", propose)
        yield stand_in
