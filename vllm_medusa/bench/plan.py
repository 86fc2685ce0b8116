"""Everything of a comparison that is decided before the first engine starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.prompts import PromptSet, load_prompts
from vllm_medusa.bench.results import prepare_out
from vllm_medusa.bench.settings import Settings, engine_options
from vllm_medusa.bench.variants import (
    BASELINE,
    VLLM_CHAIN,
    UnavailableError,
    Variant,
    missing_requirement,
    with_built_in_heads,
)
from vllm_medusa.engines.engine import default_threads, thread_environment
from vllm_medusa.reporting.provenance import provenance, vllm_version
from vllm_medusa.target.text import load_tokenizer


@dataclass(frozen=True)
class Plan:
    """The common part of the offline and the online comparison.

    Attributes:
        settings: the user's settings.
        variants: the baseline first.
        unavailable: reasons by the names of variants that cannot run here.
        prompts: the prompts.
        options: arguments of ``vllm.LLM`` common to all variants.
        environment: environment variables common to all variants.
        provenance: without the accelerator's name.
    """

    settings: Settings
    variants: Sequence[Variant]
    unavailable: Mapping[str, str]
    prompts: PromptSet
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    provenance: Mapping[str, Any]

    def settings_json(self) -> dict[str, Any]:
        """The settings, and the engines' options that follow from them."""
        common = {"engine_options": self.options, "environment": self.environment}
        return self.settings.to_json() | common

    def provenance_json(self, states: Mapping[str, VariantState]) -> dict[str, Any]:
        """The provenance, with the accelerator's name that the baseline's engine gave."""
        machine = {
            **self.provenance["machine"],
            "device": states[BASELINE].starts[0].device_name,
        }
        return {**self.provenance, "machine": machine}


def make_plan(settings: Settings, folder: Path) -> Plan:
    """Check and prepare everything that needs no engine.

    Args:
        settings: the user's settings.
        folder: directory for files of the variants; it must stay until the end.

    Raises:
        UserError: something that the user has to correct.
    """
    variants = settings.parsed_variants()
    version = vllm_version()
    unavailable: dict[str, str] = {}
    ready = []
    for variant in variants:
        try:
            if (reason := missing_requirement(variant, version)) is not None:
                raise UnavailableError(reason)
            if variant.name == VLLM_CHAIN:
                variant = with_built_in_heads(variant, settings.model, folder)
        except UnavailableError as exc:
            unavailable[variant.name] = str(exc)
        ready.append(variant)
    prepare_out(settings.out, settings.overwrite)
    return Plan(
        settings=settings,
        variants=ready,
        unavailable=unavailable,
        prompts=load_prompts(
            settings.prompts,
            load_tokenizer(settings.model, None, settings.llm_options),
            random_len=settings.random_len,
            seed=settings.seed,
        ),
        options=engine_options(settings),
        environment=thread_environment(settings.threads or default_threads()),
        provenance=provenance(None),
    )
