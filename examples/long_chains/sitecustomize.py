"""A draft source for benchmarks only: chains longer than there are heads.

`bench_steps.py` gives an engine this folder in `PYTHONPATH`, to have a plain chain with as many
draft tokens as a tree, through the same code: the heads' guesses are repeated down the chain. They
are mostly wrong there; what verifying them costs is the point.
"""

from torch import Tensor

from vllm_medusa.heads import HeadsReader
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.layout import TreeLayout

_read_blocks = HeadsReader.read_blocks


def draft_tokens(self: TreeLayout, topk: Tensor) -> Tensor:
    """As `TreeLayout.draft_tokens`, with the heads used in turns."""
    return topk[self.heads % len(topk), :, self.ranks].T


def read_blocks(self: HeadsReader, num_heads: int) -> dict[str, Tensor]:
    """As `HeadsReader.read_blocks`, of the heads that there are."""
    return _read_blocks(self, min(num_heads, self.spec.num_heads))


TreeLayout.draft_tokens = draft_tokens
HeadsReader.read_blocks = read_blocks
DraftTree.check_heads = lambda self, num_heads: None
