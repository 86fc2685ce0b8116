"""Dynamic trees: candidates of several sources, one tree per request, the nodes that pay."""

from vllm_medusa.draft.types import Draft, Drafts

__all__ = ["Draft", "Drafts"]
