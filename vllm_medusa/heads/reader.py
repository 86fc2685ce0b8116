"""Opens heads: headers and JSON files are read at once, tensors only on request.

A front end needs the sizes and the trees only. A tensor-parallel rank reads the blocks and its rows
of the lm_heads. Tools read everything. Every fault of a checkpoint is an error that names the
tensor, file or number and the remedy, so all values that are read are complete, finite and of the
right shape.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from pathlib import Path

import torch

from vllm_medusa.errors import UserError
from vllm_medusa.heads.checkpoint import SCHEDULE_FILE, TREE_FILE, HeadsCheckpoint
from vllm_medusa.heads.io.config_file import ConfigFile
from vllm_medusa.heads.io.files import open_store
from vllm_medusa.heads.io.formats import (
    GATED_LAYERS,
    PREFIX_ATTENTION,
    ROOT,
    SELECTOR,
    Plan,
    make_plan,
    select_heads,
)
from vllm_medusa.heads.io.headers import read_headers
from vllm_medusa.heads.io.hydra_names import native_names
from vllm_medusa.heads.io.resolve import resolve
from vllm_medusa.heads.io.spec import compare_config, make_spec, rows_name
from vllm_medusa.tree.draft_tree import DraftTree, read_tree_file
from vllm_medusa.tree.schedule import TreeSchedule, read_schedule_file


def load_heads(
    path: str | Path,
    *,
    revision: str | None = None,
    target_hidden_size: int | None = None,
    target_vocab_size: int | None = None,
) -> HeadsCheckpoint:
    """Load Medusa heads whole.

    Args:
        path: directory, single weights file, or hub name (`owner/name`).
        revision: of a hub name.
        target_hidden_size: of the model that the heads are to serve, if known.
        target_vocab_size: likewise.

    Raises:
        UserError: the heads are not found, incomplete, damaged, quantised or not finite, or
            were made for another hidden size or vocabulary.
    """
    reader = HeadsReader(path, revision=revision, target_vocab_size=target_vocab_size)
    reader.check_target(target_hidden_size, target_vocab_size)
    return reader.read_all()


class HeadsReader:
    """Heads whose headers and JSON files are read and checked, and whose tensors can be read.

    Args:
        path: directory, single weights file, or hub name (`owner/name`).
        revision: of a hub name.
        target_vocab_size: of the model that the heads are to serve, if known.

    Attributes:
        spec, tree_paths, tree_schedule, base_model, notes: as in `HeadsCheckpoint`.

    Raises:
        UserError: the heads are not found, incomplete, damaged or quantised.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        revision: str | None = None,
        target_vocab_size: int | None = None,
    ) -> None:
        self._location = resolve(path, "heads", select_heads, revision=revision)
        directory = self._location if self._location.is_dir() else self._location.parent
        config = ConfigFile(directory / "config.json")
        self._store = open_store(self._location, select_heads)
        plan = make_plan(
            self._location,
            self._store.keys,
            original_lm_head=config.flag("original_lm_head"),
            tie_weights=config.flag("tie_weights"),
        )
        self._headers = read_headers(self._store, plan)
        self._stored = _by_canonical_name(plan)
        self.spec = make_spec(self._location, config, plan, self._headers, target_vocab_size)
        self.tree_paths = _read_tree(directory / TREE_FILE, self.spec.num_heads)
        self.tree_schedule = _read_schedule(directory / SCHEDULE_FILE, self.spec.num_heads)
        self.base_model = config.base_model()
        self.notes = compare_config(config, plan, self.spec)

    def check_target(self, hidden_size: int | None, vocab_size: int | None) -> None:
        """Compare with the target model's sizes, as far as they are known.

        Raises:
            UserError: the heads were made for another hidden size or vocabulary.
        """
        for what, heads, target in (
            ("hidden size", self.spec.hidden_size, hidden_size),
            ("vocabulary size", self.spec.vocab_size, vocab_size),
        ):
            if None not in (heads, target) and heads != target:
                raise UserError(
                    f"{self._location}: the heads are for {what} {heads}, the target model has "
                    f"{target}; use heads that were trained for this model"
                )

    @cached_property
    def token_map(self) -> torch.Tensor | None:
        """From draft ids to target ids [V] int64; None if the heads draft every token.

        Raises:
            UserError: it names a token twice, or none of the vocabulary.
        """
        if self.spec.draft_vocab_size is None:
            return None
        if "token_map" in self._stored:
            token_map = self._part("token_map").long()
        else:
            token_map = self._speculators_map()
        low, high = int(token_map.min()), int(token_map.max())
        vocab_size = self.spec.vocab_size
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            raise UserError(
                f"{self._location}: token_map holds token {low if low < 0 else high}, outside the "
                f"vocabulary of {vocab_size} tokens; export the heads again"
            )
        if (token_map.sort().values.diff() == 0).any():
            raise UserError(
                f"{self._location}: token_map holds a token twice; export the heads again"
            )
        return token_map

    def read(self, name: str, num_heads: int | None = None) -> torch.Tensor:
        """Read a canonical tensor other than the token map, in the heads' dtype.

        Args:
            name: as in `HeadsCheckpoint.tensors`.
            num_heads: number of heads to read, from the first; None: all.

        Raises:
            UserError: it holds values that are not finite.
        """
        if self._is_common(name):
            return self._rows(name, (), 0, None).to(self.spec.dtype)
        if name in ("selector.parent", "selector.child", *PREFIX_ATTENTION, *GATED_LAYERS):
            return self._part(name).to(self.spec.dtype)
        if name.startswith(("hydra.", "speculator.")):
            return self._whole(name).to(self.spec.dtype)
        has_rows = name == rows_name(self._stored)
        lead: tuple[int, ...] = (num_heads or self.spec.num_heads,)
        if name.startswith("blocks."):
            lead += (self._headers[name].shape[1],)
        shape = [*lead, *self._headers[name].shape[len(lead) :]]
        if has_rows:
            shape[-2] = self.spec.draft_vocab_size or shape[-2]
        whole = torch.empty(shape, dtype=self.spec.dtype)
        for index in product(*map(range, lead)):
            whole[index] = self._rows(name, index, 0, None) if has_rows else self._part(name, index)
        return whole

    def read_blocks(self, num_heads: int | None = None) -> dict[str, torch.Tensor]:
        """Read the canonical tensors before the lm_heads and the selector, of the first heads."""
        of_all = (*ROOT, *GATED_LAYERS)
        names = [name for name in self._stored if name.startswith("blocks.") or name in of_all]
        count = num_heads or self.spec.num_heads
        names += [name for name in native_names(count) if name in self._stored]
        of_heads = tuple(f"speculator.{head}." for head in range(count))
        names += [name for name in self._stored if name.startswith(of_heads)]
        return {name: self.read(name, num_heads) for name in names}

    def read_selector(self, num_heads: int | None = None) -> dict[str, torch.Tensor]:
        """Read the canonical tensors of the selector for the first heads; none if there is none."""
        return {name: self.read(name, num_heads) for name in SELECTOR if name in self._stored}

    def read_prefix_attention(self) -> dict[str, torch.Tensor]:
        """Read the canonical tensors of the prefix attention; none if there is none."""
        return {name: self.read(name) for name in PREFIX_ATTENTION if name in self._stored}

    def read_rows(self, head: int, start: int, stop: int) -> torch.Tensor:
        """Read rows of a head's lm_head (of its factor `up`, if low-rank), nothing else.

        Args:
            head: index of the head; ignored if all heads have one lm_head.
            start, stop: draft id of the first row, and that of the last plus one.

        Returns:
            [stop - start, H or rank] in the dtype of the file

        Raises:
            UserError: they hold values that are not finite.
        """
        name = rows_name(self._stored)
        assert name is not None, "the heads use the target's lm_head"
        return self._rows(name, () if self._is_common(name) else (head,), start, stop)

    def read_biases(self, head: int, start: int, stop: int) -> torch.Tensor | None:
        """Read the biases [stop - start] of rows of a head's lm_head; None if there are none.

        Args:
            head: index of the head.
            start, stop: as for `read_rows`.

        Raises:
            UserError: they hold values that are not finite.
        """
        if "lm_head.bias" not in self._stored:
            return None
        return self._part("lm_head.bias", (head,), slice(start, stop))

    def read_all(self) -> HeadsCheckpoint:
        """Read all tensors.

        Raises:
            UserError: values that are not finite, or no token map.
        """
        names = [name for name in self._stored if name not in ("token_map", "d2t", "t2d")]
        tensors = {name: self.read(name) for name in names}
        if self.token_map is not None:
            tensors["token_map"] = self.token_map
        return HeadsCheckpoint(
            spec=self.spec,
            tensors=tensors,
            tree_paths=self.tree_paths,
            tree_schedule=self.tree_schedule,
            base_model=self.base_model,
            notes=self.notes,
        )

    def _is_common(self, name: str) -> bool:
        return name == "lm_head.weight" and self.spec.lm_head == "common"

    def _whole(self, name: str) -> torch.Tensor:
        """A tensor that is stored alone, or in parts by its first dimension."""
        stored = self._stored[name]
        return torch.stack([self._part(name, index) for index in sorted(stored)]).view(
            self._headers[name].shape
        )

    def _rows(
        self, name: str, index: tuple[int, ...], start: int, stop: int | None
    ) -> torch.Tensor:
        """Rows by draft id; a full lm_head beside a token map has more rows than these."""
        num_rows = self._headers[name].shape[-2]
        if self.spec.draft_vocab_size in (None, num_rows):
            return self._part(name, index, slice(start, stop))
        assert self.token_map is not None
        return self._part(name, index, self.token_map[start:stop])

    def _part(
        self,
        name: str,
        index: tuple[int, ...] = (),
        rows: slice | torch.Tensor = slice(None),
    ) -> torch.Tensor:
        """Rows of one tensor of a head and layer, which may be stored alone or stacked."""
        stored = self._stored[name]
        is_alone = index in stored
        key = stored[index if is_alone else ()]
        value = self._store.read(key)
        value = (value if is_alone else value[index])[rows]
        # The extremes are NaN if any value is; unlike `isfinite` they need no memory.
        if value.numel() and not torch.stack(torch.aminmax(value)).isfinite().all():
            raise UserError(
                f"{self._store.file_of(key)}: tensor {key!r} holds NaN or infinite values; export "
                "the heads again"
            )
        return value

    def _speculators_map(self) -> torch.Tensor:
        """Read the speculators form: d2t is target id minus draft id, t2d marks drafted tokens."""
        d2t, t2d = self._part("d2t").long(), self._part("t2d")
        token_map = d2t + torch.arange(len(d2t))
        if not torch.equal(token_map.sort().values, t2d.nonzero().flatten()):
            raise UserError(
                f"{self._location}: tensors 'd2t' and 't2d' name different tokens; export the "
                "heads again"
            )
        return token_map


def _by_canonical_name(plan: Plan) -> dict[str, dict[tuple[int, ...], str]]:
    """The stored name of each part, by canonical name and index into its leading dimensions."""
    stored: dict[str, dict[tuple[int, ...], str]] = {}
    for key, (name, index) in plan.slots.items():
        stored.setdefault(name, {})[index] = key
    return stored


def _read_tree(path: Path, num_heads: int) -> list[list[int]] | None:
    if not path.is_file():
        return None
    with _naming(path):
        paths = read_tree_file(path)
        DraftTree.from_paths(paths).check_heads(num_heads)
    return paths


def _read_schedule(path: Path, num_heads: int) -> TreeSchedule | None:
    if not path.is_file():
        return None
    with _naming(path):
        schedule = read_schedule_file(path)
        schedule.tree().check_heads(num_heads)
    return schedule


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors of a tree into errors of the heads that name the file."""
    try:
        yield
    except UserError as exc:
        raise UserError(
            f"{path}: {exc}; write the trees again with `vllm-medusa calibrate` or remove the file"
        ) from None
