"""Pure tree and verification maths: torch and the standard library only."""

from vllm_medusa.tree.draft_tree import DraftTree

__all__ = ["DraftTree"]
