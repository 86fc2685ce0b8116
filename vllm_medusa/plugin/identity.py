"""How our code finds its part of vLLM's configuration, in every process."""

from __future__ import annotations

from typing import Any

from vllm_medusa.config import CONFIG_KEY, MedusaConfig

#: ``speculative_config.model``: what vLLM imports as the draft proposer.
PROPOSER_CLASS = "vllm_medusa.plugin.worker.proposer.MedusaProposer"
#: ``parallel_config.worker_cls``.
WORKER_CLASS = "vllm_medusa.plugin.worker.worker.MedusaWorker"


def is_medusa(speculative_config: Any) -> bool:
    """Whether a ``SpeculativeConfig`` is ours."""
    return speculative_config is not None and speculative_config.model == PROPOSER_CLASS


def medusa_config_of(vllm_config: Any) -> MedusaConfig | None:
    """Return our part of vLLM's configuration, or None if Medusa was not asked for."""
    options = getattr(vllm_config, "additional_config", None)
    values = options.get(CONFIG_KEY) if isinstance(options, dict) else None
    return None if values is None else MedusaConfig.from_dict(values)


def masks_trees(vllm_config: Any) -> bool:
    """Whether the drafts of grammar requests are masked as trees.

    With a reasoning parser they are not: then a grammar can begin in the middle of the drafts, and
    vLLM finds this point by treating the drafts as a chain.
    """
    reasoning = vllm_config.structured_outputs_config
    return medusa_config_of(vllm_config) is not None and not (
        reasoning.reasoning_parser or reasoning.reasoning_parser_plugin
    )
