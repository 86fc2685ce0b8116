"""Random steps of an engine, as the kernels see them: no vLLM, any device."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import torch
from hypothesis import settings
from torch import Tensor

from vllm_medusa.kernels import NO_TREE, trees

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: How many random cases a test of a small kernel has in `make test-kernels`; 0 anywhere else.
NUM_CASES = int(os.environ.get("KERNEL_CASES", "0"))


def cases(usual: int | None = None, *, is_small: bool = True) -> settings:
    """How many random cases a test draws.

    Args:
        usual: in every other run; None: as many as the profile says.
        is_small: whether it is one of the small kernels; of the others `make test-kernels` has a
            tenth as many.

    """
    if not NUM_CASES:
        return settings() if usual is None else settings(max_examples=usual)
    return settings(max_examples=NUM_CASES if is_small else NUM_CASES // 10, derandomize=False)


def random_parents(rng: random.Random, num_drafts: int) -> list[int]:
    """Parents of a random tree, from stars to chains; the root's own is 0."""
    reach = rng.choice([1, 2, 4, num_drafts + 1])
    return [0, *(rng.randrange(max(0, i - reach), i) for i in range(1, num_drafts + 1))]


def numbers(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@dataclass
class Case:
    """A step of requests with whole trees, cut trees, placeholders, no drafts, parts of prompts."""

    rng: random.Random
    kinds: list[str]
    parents: Tensor  # [states, N + 1]
    depths: Tensor
    ancestors: Tensor
    idx_mapping: Tensor
    prefill_len: Tensor
    query_lens: list[int]
    num_logits: list[int]
    query_start_loc: Tensor
    seq_lens: Tensor
    cu_num_logits: Tensor
    logits_indices: Tensor
    positions: Tensor
    token_ancestors: Tensor
    base: Tensor
    context_lens: Tensor

    @property
    def num_reqs(self) -> int:
        return len(self.kinds)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def max_depth(self) -> int:
        return int(self.depths.max())

    def prepare(self) -> None:
        trees.prepare(
            self.positions,
            self.token_ancestors,
            self.base,
            self.context_lens,
            self.depths,
            self.ancestors,
            self.idx_mapping,
            self.query_start_loc,
            self.seq_lens,
            self.cu_num_logits,
            self.prefill_len,
        )


def states_of(rng: random.Random, num_states: int, num_drafts: int) -> list[Tensor]:
    """Parents, depths and ancestors of a random tree for each state, the oracle's way."""
    rows: list[list[list[int]]] = [[], [], []]
    for _ in range(num_states):
        parents = random_parents(rng, num_drafts)
        depths, seen = [0], [1]
        for node in range(1, num_drafts + 1):
            depths.append(depths[parents[node]] + 1)
            seen.append(seen[parents[node]] | 1 << node)
        signed = [bits - 2**64 if bits >= 2**63 else bits for bits in seen]
        for row, values in zip(rows, (parents, depths, signed), strict=True):
            row.append(values)
    return [numbers(row, torch.int64) for row in rows]


def random_case(
    seed: int,
    num_reqs: int = 3,
    num_drafts: int = 16,
    longest: int = 120,
    kinds: tuple[str, ...] = ("tree", "tree", "cut", "placeholder", "decode", "prefill"),
) -> Case:
    rng = random.Random(seed)
    num_states = num_reqs + 2
    parents, depths, ancestors = states_of(rng, num_states, num_drafts)
    index = rng.sample(range(num_states), num_reqs)
    chosen = [rng.choice(kinds) for _ in range(num_reqs)]
    prefill_len = [0] * num_states
    query_lens, num_logits, seq_lens = [], [], []
    for state, kind in zip(index, chosen, strict=True):
        computed = rng.randint(1, longest)
        drafts = {"tree": num_drafts, "placeholder": num_drafts}.get(kind, 0)
        drafts = rng.randint(1, num_drafts) if kind == "cut" else drafts
        query = rng.randint(2, 90) if kind == "prefill" else drafts + 1
        extra = {"placeholder": 1, "prefill": query + rng.randint(0, 9)}.get(kind, 0)
        prefill_len[state] = computed + extra
        query_lens.append(query)
        num_logits.append(drafts + 1)
        seq_lens.append(computed + query)
    starts = [sum(query_lens[:i]) for i in range(num_reqs + 1)]
    rows = [starts[i + 1] - count + j for i, count in enumerate(num_logits) for j in range(count)]
    positions = [s - q + i for s, q in zip(seq_lens, query_lens, strict=True) for i in range(q)]
    return Case(
        rng=rng,
        kinds=chosen,
        parents=parents,
        depths=depths,
        ancestors=ancestors,
        idx_mapping=numbers(index),
        prefill_len=numbers(prefill_len),
        query_lens=query_lens,
        num_logits=num_logits,
        query_start_loc=numbers(starts),
        seq_lens=numbers(seq_lens),
        cu_num_logits=numbers([sum(num_logits[:i]) for i in range(num_reqs + 1)]),
        logits_indices=numbers(rows, torch.int64),
        positions=numbers(positions, torch.int64),
        token_ancestors=torch.full((len(positions),), -1, dtype=torch.int64, device=DEVICE),
        base=torch.full((num_states,), NO_TREE - 1, dtype=torch.int32, device=DEVICE),
        context_lens=torch.full((num_states,), -1, dtype=torch.int32, device=DEVICE),
    )
