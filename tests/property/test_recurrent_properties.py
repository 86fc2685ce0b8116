"""Recurrent heads, along texts and in trees, against the slow ones."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles.recurrent import features
from vllm_medusa.heads.gated import GatedLayers
from vllm_medusa.heads.prefix import PrefixAttention
from vllm_medusa.heads.prefix_memory import PrefixMemory
from vllm_medusa.heads.recurrent import RecurrentHeads
from vllm_medusa.heads.sequential import SequentialTree
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.layout import TreeLayout

HIDDEN, EMBEDDING, VOCABULARY, NUM_GUESSES = 6, 4, 9, 3
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def make(window: int, generator: torch.Generator) -> tuple[RecurrentHeads, dict[str, Tensor]]:
    """Random heads of two layers, and their tensors."""
    embedding = torch.randn(VOCABULARY, EMBEDDING, generator=generator, dtype=torch.float64)
    layer = PrefixAttention(HIDDEN, EMBEDDING, window, 2, 3, dtype=torch.float64)
    layers = GatedLayers(HIDDEN, EMBEDDING, 2, 5, dtype=torch.float64)
    for module in (layer.requires_grad_(False), layers.requires_grad_(False)):
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.7 * drawn)
    heads = RecurrentHeads(layer, layers, lambda tokens: embedding[tokens])
    tensors = layer.canonical_tensors() | layers.canonical_tensors() | {"embedding": embedding}
    return heads, tensors


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=2),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_along_texts(rows: list[list[int]], window: int, num_heads: int, seed: int) -> None:
    """Several texts in a row, rows padded at the end; only features within a text count."""
    generator = torch.Generator().manual_seed(seed)
    heads, tensors = make(window, generator)
    size = max(map(sum, rows))
    hidden = torch.randn(len(rows), size, HIDDEN, generator=generator, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (len(rows), size), generator=generator)
    lengths = [[*row, size - sum(row)] for row in rows]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    found = heads.along(num_heads, hidden, tokens, positions)
    found = heads.by_head(num_heads, found.flatten(0, 1)).unflatten(1, hidden.shape[:2])
    for row, of_row in enumerate(rows):
        start = 0
        for length in of_row:
            text = slice(start, start + length)
            states, embedded = hidden[row, text], tensors["embedding"][tokens[row, text]]
            for at in range(length - 1):
                for head in range(min(num_heads, length - 1 - at)):
                    wanted = features(
                        tensors,
                        *(states[: at + 1], embedded[1 : at + 2], range(at + 1)),
                        embedded[at + 2 : at + 2 + head],
                    )
                    torch.testing.assert_close(found[head, row, start + at], wanted, **TIGHT)
            start += length


@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 2**31), st.data())
def test_trees(window: int, num_texts: int, seed: int, data: st.DataObject) -> None:
    """Each node's guesses see its own path and the text; parts of a text may be missing."""
    generator = torch.Generator().manual_seed(seed)
    heads, tensors = make(window, generator)
    lm_head = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    paths = data.draw(st.sampled_from(TREES))
    tree = DraftTree.from_paths(paths)
    memory = PrefixMemory.make(heads.prefix, num_texts + 1)
    lengths = [data.draw(st.integers(1, 12)) for _ in range(num_texts)]
    places = torch.randperm(num_texts + 1, generator=generator)[:num_texts]
    texts, known = [], []
    for place, length in zip(places, lengths, strict=True):
        hidden = torch.randn(length, HIDDEN, generator=generator, dtype=torch.float64)
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        seen = [p for p in range(length) if p == length - 1 or data.draw(st.booleans())]
        kept = torch.tensor(seen[-window:])
        memory.keep(
            place.expand(len(kept)),
            kept,
            *heads.prefix.keys_and_values(hidden[kept], heads.embed(tokens[kept])),
        )
        texts.append((hidden, tokens))
        known.append(seen)

    def guess(head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        best = (rows @ lm_head.T).topk(NUM_GUESSES)
        return best.values, best.indices

    ends = torch.tensor(lengths) - 1
    made = SequentialTree.of(TreeLayout.build(tree).levels)
    drafted = made.draft(
        heads.reading(tree.depth, memory.windows(places, ends)),
        torch.stack([hidden[-1] for hidden, _ in texts]),
        torch.stack([tokens[-1] for _, tokens in texts]),
        guess,
    )
    for row, (hidden, tokens) in enumerate(texts):
        found: dict[tuple[int, ...], list[int]] = {(): []}
        for node, path in enumerate(tree.paths):
            above = found[path[:-1]]
            made_of = features(
                tensors,
                *(hidden, heads.embed(tokens), known[row]),
                heads.embed(torch.tensor(above, dtype=torch.int64)),
            )
            best = (made_of @ lm_head.T).topk(NUM_GUESSES).indices
            found[path] = [*above, int(best[path[-1]])]
            assert int(drafted[row, node]) == found[path][-1]


TREES = (
    [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]],
    [[0], [1], [0, 0], [1, 0], [1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 2], [1, 1, 2, 1]],
    [[0], [2]],
)
