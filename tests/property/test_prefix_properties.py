"""Prefix attention, along texts and with a memory, against the slow one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.prefix import in_context
from tests.training import make_settings, make_target
from vllm_medusa.heads.prefix import PrefixAttention
from vllm_medusa.heads.prefix_memory import PrefixMemory
from vllm_medusa.training.new_layers import new_prefix_attention

HIDDEN, EMBEDDING, HEADS, SIZE = 6, 4, 2, 3
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def layer(window: int, generator: torch.Generator) -> PrefixAttention:
    made = PrefixAttention(HIDDEN, EMBEDDING, window, HEADS, SIZE, dtype=torch.float64)
    made.requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def text(length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and embeddings of what follows."""
    return (
        torch.randn(length, HIDDEN, generator=generator, dtype=torch.float64),
        torch.randn(length, EMBEDDING, generator=generator, dtype=torch.float64),
    )


@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_along_texts(rows: list[list[int]], window: int, seed: int) -> None:
    """Several texts in a row, rows padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    prefix = layer(window, generator)
    size = max(map(sum, rows))
    texts = [[text(length, generator) for length in row] for row in rows]
    hidden, following = (
        torch.zeros(len(rows), size, HIDDEN),
        torch.zeros(len(rows), size, EMBEDDING),
    )
    hidden, following = hidden.double(), following.double()
    positions = torch.zeros(len(rows), size, dtype=torch.int64)
    for row, of_row in enumerate(texts):
        end = sum(rows[row])
        hidden[row, :end] = torch.cat([states for states, _ in of_row])
        following[row, :end] = torch.cat([embedded for _, embedded in of_row])
        lengths = [*rows[row], size - end]
        positions[row] = torch.cat([torch.arange(length) for length in lengths])
    found = prefix.along(hidden, following, positions)
    for row, of_row in enumerate(texts):
        start = 0
        for states, embedded in of_row:
            for at in range(len(states)):
                wanted = in_context(
                    prefix.canonical_tensors(), states, embedded, at, range(len(states))
                )
                torch.testing.assert_close(found[row, start + at], wanted, **TIGHT)
            start += len(states)


@given(st.integers(1, 7), st.integers(0, 2**31), st.data())
def test_with_a_memory(window: int, seed: int, data: st.DataObject) -> None:
    """Two texts, kept in steps of any size; some parts are missing, as from a cached prefix."""
    generator = torch.Generator().manual_seed(seed)
    prefix = layer(window, generator)
    memory = PrefixMemory.make(prefix, 2)
    texts = [text(24, generator) for _ in range(2)]
    done, known = [0, 0], [set[int](), set[int]()]
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, 1))
        if data.draw(st.booleans()) and data.draw(st.booleans()):  # computed again
            memory.forget(place)
            done[place], known[place] = 0, set()
        start = done[place] + data.draw(st.sampled_from([0, 0, 0, 3]))
        end = start + data.draw(st.integers(1, 6))
        if end > 24:
            continue
        states, embedded = texts[place]
        kept = torch.arange(max(start, end - window), end)
        repeated = torch.cat((kept, kept[-1:].repeat(data.draw(st.integers(0, 2)))))
        keys, values = prefix.keys_and_values(states[repeated], embedded[repeated])
        memory.keep(torch.full_like(repeated, place), repeated, keys, values)
        done[place] = end
        known[place] |= set(kept.tolist())
        ready = [i for i in range(2) if done[i]]
        last = torch.tensor([done[i] - 1 for i in ready])
        states = torch.stack([texts[i][0][done[i] - 1] for i in ready])
        embedded = torch.stack([texts[i][1][done[i] - 1] for i in ready])
        queries = prefix.queries(states, embedded)
        windows = memory.windows(torch.tensor(ready), last)
        found = prefix.read(states, queries, windows, prefix.bias_by_distance(windows, 0))
        for row, i in enumerate(ready):
            wanted = in_context(prefix.canonical_tensors(), *texts[i], done[i] - 1, known[i])
            torch.testing.assert_close(found[row], wanted, **TIGHT)


def test_new_layer_changes_nothing() -> None:
    target = make_target()
    prefix = new_prefix_attention(make_settings(prefix_attention=True, prefix_window=4), target)
    hidden, following = torch.randn(2, 1, 9, target.hidden_size)
    found = prefix.along(hidden, following, torch.arange(9)[None])
    assert torch.equal(found, hidden)
    assert prefix.projection.abs().sum() > 0
