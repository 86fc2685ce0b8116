"""The keys of ``speculative_config`` that the user gives, checked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_medusa.errors import UserError, shown
from vllm_medusa.tree.draft_tree import MAX_DRAFT_TOKENS
from vllm_medusa.tree.limits import SOURCES
from vllm_medusa.tree.named import AUTO, DYNAMIC
from vllm_medusa.tree.typical import TypicalRule

#: Keys that only dynamic trees have, as in `DynamicTrees`.
DYNAMIC_KEYS = ("max_nodes", "max_depth", "sources", "shared_text", "learn", "measure_costs")
#: Keys that only typical acceptance has, as in `TypicalRule`.
POSTERIOR_KEYS = ("posterior_threshold", "posterior_alpha")
LOSSLESS, TYPICAL = "lossless", "typical"


@dataclass(frozen=True, kw_only=True)
class MedusaOptions:
    """The user's options in vLLM's ``speculative_config``.

    Attributes:
        model: directory, file or hub name of the heads; None: the target model's own directory.
        revision: hub revision of the heads.
        tree: ``"auto"``, ``"dynamic"``, ``"static"``, a named tree, the path of a tree file, or a
            list of paths.
        num_speculative_tokens: number of draft nodes; must agree with the tree, if one is given.
        num_speculative_tokens_per_batch_size: number of draft nodes by batch size, as vLLM's key
            of that name: ``[[first, last, nodes], ...]``; 0 nodes: nothing is drafted.
        acceptance: ``"lossless"``, or ``"typical"``, which changes the output's distribution.
        posterior_threshold, posterior_alpha: only for typical acceptance, as in `TypicalRule`.
        max_tree_requests: how many requests can hold fork blocks at the same time; None: as many as
            an eighth of the KV cache allows. All other requests draft a chain.
        max_nodes, max_depth, sources, shared_text, learn, measure_costs: only for dynamic trees, as
            in `DynamicTrees`.

    """

    model: str | None = None
    revision: str | None = None
    tree: str | Sequence[Sequence[int]] = AUTO
    num_speculative_tokens: int | None = None
    num_speculative_tokens_per_batch_size: Sequence[Sequence[int]] | None = None
    acceptance: str = LOSSLESS
    posterior_threshold: float | None = None
    posterior_alpha: float | None = None
    max_tree_requests: int | None = None
    max_nodes: int | None = None
    max_depth: int | None = None
    sources: Sequence[str] | None = None
    shared_text: bool | None = None
    learn: bool | None = None
    measure_costs: bool | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MedusaOptions:
        """Check the values of a ``speculative_config`` whose method is ``medusa``.

        Raises:
            UserError: if a key is not known or a value is not allowed.

        """
        given = {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in with_underscores(values).items()
            if key != "method" and value is not None
        }
        for key in given:
            if key not in _keys():
                raise UserError(
                    f"speculative_config has {shown(key)}, which method 'medusa' does not know; "
                    f"use {', '.join(_keys())}"
                )
        request = cls(**given)
        request._check()
        return request

    def _check(self) -> None:
        if not is_acceptance(self.acceptance):
            raise UserError(
                f"acceptance={shown(self.acceptance)} is not supported; use 'lossless', which "
                "keeps the target model's output distribution, or 'typical', which does not"
            )
        check_posterior(self.acceptance, _given(self, POSTERIOR_KEYS))
        for key in ("model", "revision"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{key}={shown(value)} must be a string")
        if self.revision is not None and self.model is None:
            raise UserError(
                f"revision={shown(self.revision)} in speculative_config is that of the heads, but "
                "no model is given there; name the heads' model, or leave revision out: heads in "
                "the target's own repository come with the target's revision"
            )
        self._check_dynamic()
        for key in ("num_speculative_tokens", "max_tree_requests", "max_nodes", "max_depth"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{key}={shown(value)} must be a positive integer")
        if self.max_nodes is not None and self.max_nodes > MAX_DRAFT_TOKENS:
            raise UserError(
                f"max_nodes={self.max_nodes} is over the {MAX_DRAFT_TOKENS} draft tokens that vLLM "
                "verifies in a step; lower it"
            )
        if self.num_speculative_tokens_per_batch_size is not None:
            _check_sizes(self.num_speculative_tokens_per_batch_size)
        if not isinstance(self.tree, (str, Sequence)):
            raise UserError(
                f"tree={shown(self.tree)} must be 'auto', a tree's name, a tree file or a list of "
                "paths"
            )

    @property
    def is_sized(self) -> bool:
        """Whether numbers of draft nodes are given, which only static trees can have."""
        return not (
            self.num_speculative_tokens is None
            and self.num_speculative_tokens_per_batch_size is None
        )

    @property
    def is_dynamic(self) -> bool:
        """Whether the trees are dynamic."""
        # The tree can be of any type until it is checked.
        return isinstance(self.tree, str) and (
            self.tree == DYNAMIC or (self.tree == AUTO and not self.is_sized)
        )

    @property
    def dynamic_values(self) -> dict[str, Any]:
        """The given values of `DYNAMIC_KEYS`."""
        return _given(self, DYNAMIC_KEYS)

    def _check_dynamic(self) -> None:
        """Check the keys that only dynamic trees have."""
        for key, value in self.dynamic_values.items():
            if not self.is_dynamic:
                sized = " with a number of nodes" if self.is_sized else ""
                raise UserError(
                    f"{key}={shown(value)} is for dynamic trees, but the tree is "
                    f"{shown(self.tree)}{sized}; use tree='dynamic' or leave {key} out"
                )
        if self.is_dynamic and self.is_sized:
            raise UserError(
                "num_speculative_tokens sizes static trees, but the tree is 'dynamic'; bound it "
                "with max_nodes"
            )
        for key in ("shared_text", "learn", "measure_costs"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, bool):
                raise UserError(f"{key}={shown(value)} must be true or false")
        sources = self.sources
        if sources is not None and (
            not isinstance(sources, (list, tuple))
            or not sources
            or not all(isinstance(name, str) and name in SOURCES for name in sources)
        ):
            raise UserError(
                f"sources={shown(sources)} must be a list of some of "
                f"{', '.join(map(repr, SOURCES))}"
            )


def is_acceptance(value: Any) -> bool:
    """Whether a value, of any type, is a name of a rule of acceptance."""
    return isinstance(value, str) and value in (LOSSLESS, TYPICAL)


def check_posterior(acceptance: Any, values: Mapping[str, Any]) -> None:
    """Check values of `POSTERIOR_KEYS`, which only typical acceptance has.

    Raises:
        UserError: if one is not allowed.

    """
    for key, value in values.items():
        if acceptance != TYPICAL:
            raise UserError(
                f"{key}={shown(value)} is for acceptance='typical', but acceptance is "
                f"{shown(acceptance)}; leave {key} out"
            )
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise UserError(f"{key}={shown(value)} must be a number above 0 and at most 1")


def typical_rule(options: Any) -> TypicalRule | None:
    """Return the rule of an engine's or a request's options; None: lossless acceptance."""
    if options.acceptance != TYPICAL:
        return None
    return TypicalRule(**_given(options, POSTERIOR_KEYS))


def _given(options: Any, keys: Sequence[str]) -> dict[str, Any]:
    values = {key: getattr(options, key) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def with_underscores(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a ``speculative_config`` with ``a_key`` for ``a-key``.

    Raises:
        UserError: if a key is not a string, or is given in both spellings.

    """
    spelled: dict[str, str] = {}
    for key in values:
        if not isinstance(key, str):
            raise UserError(
                f"speculative_config has the key {shown(key)}, which is not a string; "
                f"use {', '.join(_keys())}"
            )
        name = key.replace("-", "_")
        if name in spelled:
            raise UserError(
                f"speculative_config has {shown(spelled[name])} and {shown(key)}, which are the "
                "same key; remove one of them"
            )
        spelled[name] = key
    return {name: values[key] for name, key in spelled.items()}


def _keys() -> list[str]:
    return [field.name for field in dataclasses.fields(MedusaOptions)]


def _check_sizes(sizes: Any) -> None:
    """Check ``num_speculative_tokens_per_batch_size`` as vLLM does (``v1/spec_decode/dynamic``)."""
    before, largest = 0, 0
    for size in sizes if isinstance(sizes, (list, tuple)) else [sizes]:
        if (
            not isinstance(size, (list, tuple))
            or len(size) != 3
            or any(type(number) is not int for number in size)
            or not (size[1] >= size[0] > before and size[2] >= 0)
            or (not before and size[0] != 1)
        ):
            raise UserError(
                f"num_speculative_tokens_per_batch_size has {shown(size)}; use [first batch size, "
                "last batch size, draft nodes] in rising order from batch size 1, "
                "such as [[1, 4, 16], [5, 64, 4]]"
            )
        before, largest = size[1], max(largest, size[2])
    if not largest:
        raise UserError(
            f"num_speculative_tokens_per_batch_size={shown(sizes)} drafts nothing at any batch "
            "size; leave speculative_config out instead"
        )
