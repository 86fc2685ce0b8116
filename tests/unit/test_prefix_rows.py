"""What a step keeps for prefix attention: rows, positions and the tokens after them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.plugin.worker.v1.prefix_rows import PrefixRows

WINDOW, NUM_PLACES = 4, 2


class Kept:
    """A `PrefixContext` that keeps numbers: (place, position) to (hidden row, token after it)."""

    window, nowhere = WINDOW, NUM_PLACES

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], tuple[int, int]] = {}
        self.forgotten: list[int] = []
        self.num_rows = 0

    def forget(self, place: int) -> None:
        self.forgotten.append(place)
        self.entries = {key: value for key, value in self.entries.items() if key[0] != place}

    def keep(self, hidden: Tensor, following: Tensor, places: Tensor, positions: Tensor) -> None:
        self.num_rows = len(hidden)
        rows = (hidden[:, 0], following, places, positions)
        for row, token, place, position in zip(*(r.tolist() for r in rows), strict=True):
            if place != self.nowhere:
                self.entries[place, position] = (int(row), token)


def step(**requests: tuple[int, int, list[int]]) -> Any:
    """Tokens that each request runs, tokens before them, and drafts."""
    tokens, computed, drafts = zip(*requests.values(), strict=True)
    return SimpleNamespace(
        req_ids=tuple(requests),
        num_tokens=np.array(tokens),
        num_computed=np.array(computed),
        drafts=drafts,
    )


def hidden_of(num_tokens: int) -> Tensor:
    """Rows that tell their number."""
    return torch.arange(num_tokens)[:, None].float()


TEXTS = np.arange(40, dtype=np.int32).reshape(2, 20)  # token of a position: itself, or 20 more


def test_prompts_chunks_and_accepted_paths() -> None:
    context = Kept()
    rows = PrefixRows(context)
    # A chunk of a prompt, and a tree of 3 drafts whose nodes 2 and 3 were accepted.
    path = torch.tensor([[0, 0, 0], [0, 2, 3]])
    view = rows.keep(
        step(a=(6, 0, []), b=(4, 7, [1, 2, 3])),
        [[], [28, 29, 30]],
        TEXTS,
        hidden_of(10),
        path,
    )
    a, b = view.places.tolist()
    assert view.positions.tolist() == [5, 9]
    assert context.entries == {
        **{(a, position): (position, position + 1) for position in (2, 3, 4, 5)},
        (b, 7): (6, 28),
        (b, 8): (8, 29),
        (b, 9): (9, 30),
    }


def test_no_rows_for_what_no_tree_accepted() -> None:
    context = Kept()
    path = torch.arange(9).expand(2, -1)
    rows = PrefixRows(context)
    rows.keep(step(a=(9, 5, [0] * 8), b=(9, 7, [0] * 8)), [[1, 2], [1]], TEXTS, hidden_of(18), path)
    assert context.num_rows == 2 * 2


def test_path_longer_than_the_window() -> None:
    context = Kept()
    path = torch.arange(7)[None]
    drafts = [1, 2, 3, 4, 5, 6]
    PrefixRows(context).keep(
        step(a=(7, 3, drafts)), [list(range(4, 11))], TEXTS, hidden_of(7), path
    )
    assert sorted(position for _, position in context.entries) == [6, 7, 8, 9]


def test_request_that_begins_gets_an_empty_place() -> None:
    """And takes that of one that waits, if there is no other."""
    context = Kept()
    rows, root = PrefixRows(context), torch.zeros(1, 1, dtype=torch.int64)

    def run(name: str) -> int:
        view = rows.keep(step(**{name: (3, 0, [])}), [[3]], TEXTS, hidden_of(3), root)
        return int(view.places[0])

    first, second = run("a"), run("b")
    assert {first, second} == {0, 1}
    assert run("a") == first
    assert context.forgotten == [first, second]
    assert run("c") == first  # "a" began first
    assert context.forgotten == [first, second, first]
    rows.forget(["b"])
    assert run("d") == second
