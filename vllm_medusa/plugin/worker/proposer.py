"""The draft proposer: hidden states -> heads -> guesses -> tree tokens.

To vLLM it is a ``custom_class`` proposer; the runner calls `propose` itself, because vLLM hands
such a proposer no hidden states (``propose_draft_token_ids``, ``gpu_model_runner.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from vllm_medusa.config import CONFIG_KEY, MedusaConfig
from vllm_medusa.draft.probability import Probabilities, probabilities_of_heads
from vllm_medusa.draft.superset import Superset
from vllm_medusa.heads import HeadsReader, MedusaHeads
from vllm_medusa.heads.gated import GatedLayers
from vllm_medusa.heads.prefix import PrefixAttention
from vllm_medusa.heads.recurrent import RecurrentHeads
from vllm_medusa.heads.selector import NUM_CANDIDATES, Selector, SelectorTree
from vllm_medusa.heads.sequential import SequentialHeads, SequentialTree, make_sequential
from vllm_medusa.plugin.worker.embedding import target_embedding
from vllm_medusa.plugin.worker.lm_heads import LmHeads, read_lm_heads, target_lm_heads
from vllm_medusa.plugin.worker.prefix import PrefixContext, PrefixPlaces
from vllm_medusa.plugin.worker.products import PlatformProduct
from vllm_medusa.tree.layout import Level, TreeLayout, levels_of

#: [B] the token that the target sampled last for each request; goes to the device if needed.
Roots: TypeAlias = NDArray[np.int64] | Tensor


class MedusaProposer:
    """Drafts a tree of tokens from the target's hidden states.

    Args:
        vllm_config: vLLM's configuration; ours is in its ``additional_config``.

    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.config = MedusaConfig.from_dict(vllm_config.additional_config[CONFIG_KEY])
        self._vllm_config = vllm_config
        self._device = vllm_config.device_config.device
        self._layout = TreeLayout.build(self.config.tree, self._device)
        self._logit_scale = 1.0
        self._blocks: MedusaHeads
        self._lm_heads: LmHeads
        self._token_map: Tensor | None = None
        self._embed: Callable[[Tensor], Tensor] | None = None
        #: The layer before the heads, for heads that have one.
        self.prefix: PrefixContext | None = None
        #: The nodes whose tokens depend on their parents', for heads with a selector.
        self.selector_tree: SelectorTree | None = None
        #: All nodes, for heads that run in turn, and these heads.
        self.sequential_tree: SequentialTree | None = None
        self._in_turn: SequentialHeads | RecurrentHeads | None = None
        self._num_guesses = self.config.tree.top_k

    def load_model(self, target: nn.Module) -> None:
        """Load as many heads as the tree is deep, each rank its rows of their lm_heads.

        Raises:
            UserError: if values are not finite, or the heads do not fit the target.

        """
        model_config = self._vllm_config.model_config
        vocab_size, dtype = model_config.get_vocab_size(), model_config.dtype
        reader = HeadsReader(
            self.config.heads, revision=self.config.revision, target_vocab_size=vocab_size
        )
        reader.check_target(model_config.get_hidden_size(), vocab_size)
        num_heads = self.config.tree.depth
        if reader.spec.lm_head == "target":
            self._lm_heads = target_lm_heads(target, self.config.heads)
        else:
            self._lm_heads = read_lm_heads(
                reader,
                num_heads,
                dtype,
                self._device,
                rank=get_tensor_model_parallel_rank(),
                world_size=get_tensor_model_parallel_world_size(),
            )
        self._read_layers(reader, target, vocab_size)
        self._logit_scale = reader.spec.logit_scale
        token_map = reader.token_map
        self._token_map = None if token_map is None else token_map.to(self._device)

    @property
    def by_parent(self) -> bool:
        """Whether a node's guesses depend on the path above it (`Superset.by_parent`)."""
        return self.selector_tree is not None or self.sequential_tree is not None

    @property
    def num_levels(self) -> int:
        """Levels of the tree that the heads run one after the other; 1 if they run at once."""
        return 1 if self.sequential_tree is None else len(self.sequential_tree.sizes)

    def _read_layers(self, reader: HeadsReader, target: nn.Module, vocab_size: int) -> None:
        """Read the layers before the lm_heads, and the selector, all of them on every rank.

        Heads that see tokens also get the target's embedding.
        """
        spec, dtype = reader.spec, self._vllm_config.model_config.dtype
        tensors = reader.read_blocks(self.config.tree.depth)
        if spec.root_size is not None:
            self._embed = target_embedding(target, vocab_size, spec.root_size, self.config.heads)
        if spec.prefix_window is not None:
            assert self._embed is not None
            layer = PrefixAttention.from_tensors(
                reader.read_prefix_attention(), dtype, self._device
            )
            if self._device.type == "cpu":
                layer.product = PlatformProduct()
            num_requests = self._vllm_config.scheduler_config.max_num_seqs
            self.prefix = PrefixContext(layer, self._embed, vocab_size, num_requests)
        if spec.is_sequential:
            self.sequential_tree = SequentialTree.of(self._levels())
        if spec.kind == "recurrent":
            assert self._embed is not None
            layers = GatedLayers.from_tensors(tensors, dtype, self._device)
            layers.product = layer.product
            self._in_turn = RecurrentHeads(layer, layers, self._embed)
        elif spec.is_sequential:
            self._in_turn = make_sequential(
                spec, tensors, self.config.tree.depth, self._embed, dtype, self._device
            )
        else:
            self._blocks = MedusaHeads.from_tensors(tensors, dtype, self._device)
        if spec.selector_rank is not None:
            tensors = reader.read_selector(self.config.tree.depth)
            selector = Selector.from_tensors(tensors, dtype, self._device)
            self.selector_tree = SelectorTree(selector, self._levels())
            num_tokens = spec.draft_vocab_size or vocab_size
            self._num_guesses = max(self._num_guesses, min(NUM_CANDIDATES, num_tokens))

    def _levels(self) -> tuple[Level, ...]:
        """Return the levels of the static tree, or of the rank paths of dynamic trees."""
        if self.config.dynamic is None:
            return self._layout.levels
        parents, ranks = map(torch.from_numpy, self.superset().as_nodes())
        return levels_of(parents.to(self._device), ranks.to(self._device))

    def superset(self) -> Superset:
        """Return the rank paths that dynamic trees hold."""
        assert self.config.dynamic is not None
        return self.probabilities().superset.cut_to_depth(self.config.dynamic.max_depth)

    def probabilities(self) -> Probabilities:
        """Return the curves of dynamic trees, with their rank paths.

        For heads that run in turn these are the paths of the heads' tree: they compute the guesses
        below every path, so that hundreds of paths would take too long.
        """
        config = self.config
        found = probabilities_of_heads(config.heads, config.tree.depth, config.tree.top_k)
        if config.in_turn:
            found = dataclasses.replace(found, superset=Superset.of_tree(config.tree))
        return found

    @torch.inference_mode()
    def propose(
        self, hidden_states: Tensor, roots: Roots, ends: PrefixPlaces | None = None
    ) -> Tensor:
        """Draft one tree per request.

        Args:
            hidden_states: [B, H] target's final hidden state at each request's last accepted
                token.
            roots: [B] the token after it, which the target has sampled.
            ends: where the texts end, on the device, for heads with prefix attention.

        Returns:
            [B, N] int64 token of each draft node.

        """
        roots = self._on_device(roots)
        states, in_turn = self._in_context(hidden_states, roots, ends)
        if in_turn is not None and self.sequential_tree is not None:
            return self.sequential_tree.draft(in_turn, states, roots, self._guess)
        logits, tokens = self.guesses(states, roots)
        if self.selector_tree is None:
            return self._layout.draft_tokens(tokens)
        return self.selector_tree.draft(logits, tokens, roots)

    def _in_context(
        self, hidden_states: Tensor, roots: Tensor, ends: PrefixPlaces | None
    ) -> tuple[Tensor, SequentialHeads | None]:
        """The [B, H] states that the heads read, and the heads if they run in turn.

        Recurrent heads run the prefix attention themselves, once for each level of their tree.
        """
        heads = self._in_turn
        if isinstance(heads, RecurrentHeads):
            assert self.prefix is not None
            assert ends is not None
            return hidden_states, heads.reading(self.config.tree.depth, self.prefix.windows(ends))
        if self.prefix is not None:
            assert ends is not None
            hidden_states = self.prefix.at(hidden_states, roots, ends)
        return hidden_states, heads

    def guesses(self, hidden_states: Tensor, roots: Roots) -> tuple[Tensor, Tensor]:
        """Return the best guesses of each of the heads that run at once, the best first.

        There are as many as the tree has ranks, or as a selector ranks again, if this is more.

        Args:
            hidden_states: as for `propose`; what the prefix attention has made of them.
            roots: as for `propose`.

        Returns:
            [K, B, k] logits (float32 where ranks share the lm_heads) and [K, B, k] int64 tokens of
            the target's vocabulary.

        """
        return self._best(self._lm_heads.logits(self._features(hidden_states, roots)))

    @torch.inference_mode()
    def probable_guesses(
        self,
        hidden_states: Tensor,
        roots: Roots,
        ends: PrefixPlaces | None = None,
        max_rows: int | None = None,
        num_levels: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the heads' guesses and their probabilities.

        With a draft vocabulary these are probabilities within it.

        Args:
            hidden_states: as for `propose`.
            roots: as for `propose`.
            ends: as for `propose`.
            max_rows: most nodes of a level that heads which run in turn go on from, of all
                requests, the most probable of each, and one at least; None: all.
            num_levels: levels that heads which run in turn compute; None: all.

        Returns:
            [T, B, k] float32 log-probabilities and [T, B, k] int64 tokens of the target's
            vocabulary, in the tables that a `Superset` reads: T is the number of heads, or with a
            selector, or for heads that run in turn, that of the paths that have children.

        """
        roots = self._on_device(roots)
        states, in_turn = self._in_context(hidden_states, roots, ends)
        if in_turn is not None and self.sequential_tree is not None:
            width = None if max_rows is None else max(1, max_rows // len(roots))
            return self.sequential_tree.probable(
                in_turn, states, roots, self._guess_probably, width, num_levels
            )
        parts = self._lm_heads.logits(self._features(states, roots))
        log_probs, tokens = self._probable(parts)
        if self.selector_tree is None:
            return log_probs, tokens
        top_k = self.config.tree.top_k
        log_probs, tokens = self.selector_tree.probable(log_probs, tokens, roots)
        return log_probs[..., :top_k], tokens[..., :top_k]

    def _guess(self, head: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """[N, k] logits and tokens of one head's best guesses, from [N, F]."""
        values, tokens = self._best([self._lm_heads.of_head(features, head)[None]])
        return values[0], tokens[0]

    def _guess_probably(self, head: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """[N, k] log-probabilities and tokens of the same."""
        log_probs, tokens = self._probable([self._lm_heads.of_head(features, head)[None]])
        return log_probs[0], tokens[0]

    def _probable(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `_best`, with log-probabilities in place of logits."""
        values, tokens = self._best(parts)
        scaled = [part.float() for part in parts]
        if self._logit_scale != 1.0:
            scaled = [part * self._logit_scale for part in scaled]
        totals = torch.cat([part.logsumexp(dim=-1, keepdim=True) for part in scaled])
        if get_tensor_model_parallel_world_size() > 1:
            totals = tensor_model_parallel_all_gather(totals, dim=-1)
            totals = totals.logsumexp(dim=-1, keepdim=True)
        return values.float() - totals, tokens

    def _features(self, hidden_states: Tensor, roots: Roots) -> Tensor:
        """[K, B, H] that the lm_heads read."""
        seen = None
        if self._blocks.root is not None:
            assert self._embed is not None
            seen = self._embed(self._on_device(roots))
        features: Tensor = self._blocks(hidden_states, seen)
        return features

    def _on_device(self, roots: Roots) -> Tensor:
        return torch.as_tensor(roots, device=self._device)

    def _best(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Choose the best of each head's logits, which come in parts [heads, B, rows]."""
        top_k = self._num_guesses
        # Siblings differ only by their ranks, so the order of equal logits does not matter.
        best = [part.topk(min(top_k, part.shape[-1]), dim=-1) for part in parts]
        values = torch.cat([part.values for part in best])
        tokens = torch.cat([part.indices for part in best]) + self._lm_heads.first_token
        if get_tensor_model_parallel_world_size() > 1:
            values, tokens = _best_of_all_ranks(values, tokens, top_k)
        if self._token_map is not None:
            tokens = self._token_map[tokens]
        return values * self._logit_scale, tokens


def _best_of_all_ranks(values: Tensor, tokens: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """[K, B, k] of each rank, from [K, B, at most k] of this one; a rank may have fewer rows."""
    # In one piece and as float32, which vLLM's collectives accept on every platform and which holds
    # every token id exactly.
    guesses = torch.stack((values.float(), tokens.float()))
    missing = top_k - guesses.shape[-1]
    guesses = nn.functional.pad(guesses, (0, missing), value=-torch.inf)
    values, tokens = tensor_model_parallel_all_gather(guesses, dim=-1)
    best = values.topk(top_k, dim=-1)
    return best.values, tokens.gather(-1, best.indices).long()
