"""A draft source for benchmarks only: chains longer than there are heads.

`bench_steps.py` runs this in an engine's process, to have a plain chain with as many draft tokens
as a tree, through the same code: the heads' guesses are repeated down the chain. They are mostly
wrong there; what verifying them costs is the point.
"""

from torch import Tensor

from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.layout import TreeLayout


def draft_tokens(self: TreeLayout, topk: Tensor) -> Tensor:
    """As `TreeLayout.draft_tokens`, with the heads used in turns."""
    return topk[self.heads % len(topk), :, self.ranks].T


TreeLayout.draft_tokens = draft_tokens
DraftTree.check_heads = lambda self, num_heads: None
