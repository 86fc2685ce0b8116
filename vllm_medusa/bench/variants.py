"""The variants: engines that differ in their speculation, given as a word or as JSON."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vllm_medusa.errors import UserError
from vllm_medusa.settings import settings

BASELINE = "baseline"
VLLM_CHAIN = "vllm-chain"

#: Draft tokens in each step of vLLM's methods that need a number; JSON can give another one.
NUM_DRAFTS = 4
#: Search for the last 2 to 4 tokens in the text so far, 5 draft tokens: as in vLLM's examples.
_NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}
_WITH_PATH = ("draft_model", "eagle", "eagle3")
KINDS = (
    "baseline, tree, tree=TREE, chain, vllm-chain, vllm-chain=HEADS, ngram, suffix, "
    "draft_model=PATH, eagle=PATH, eagle3=PATH or 'name={JSON of a speculative config}'"
)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_NAME = re.compile(r"[\w.,+:@ -]{1,60}")


class UnavailableError(Exception):
    """A variant cannot run here; the message says what is missing, in one line."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One engine of a comparison.

    Attributes:
        name: what tables and plots call it.
        speculative: vLLM's ``speculative_config``; None for no speculation.
        llm_options: arguments of ``vllm.LLM`` beside those common to all variants.
        environment: environment variables beside those common to all variants.
        is_lossless: whether its greedy outputs must equal the baseline's.
        converted_from: the original heads, if the run converted them for ``speculative``.
    """

    name: str
    speculative: Mapping[str, Any] | None = None
    llm_options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    is_lossless: bool = True
    converted_from: str | None = None


@settings
class _Entry:
    """A variant in a YAML file."""

    FLAGS: ClassVar[Mapping[str, str]] = {
        name: name for name in ("speculative_config", "llm_options", "environment", "lossless")
    }

    speculative_config: Mapping[str, Any] | None = None
    llm_options: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None
    lossless: bool | None = None


def parse_variants(texts: Sequence[str], heads: str | None) -> list[Variant]:
    """Read variants as the command line gives them; the baseline is there in any case, and first.

    Args:
        texts: such as ``tree=cpu-16``.
        heads: the Medusa heads of ``tree``, ``chain`` and ``vllm-chain``, if that names none; None:
            the model's own.

    Raises:
        UserError: an unknown variant, or two with one name.
    """
    return _checked([_parse(text, heads) for text in texts])


def variants_of_config(entries: Any, heads: str | None) -> list[Variant]:
    """Read variants of a YAML file.

    Args:
        entries: a list as on the command line, or a mapping from names to: nothing (the name is the
            variant), a text as on the command line, or a mapping with any of
            ``speculative_config``, ``llm_options``, ``environment`` and ``lossless``.
        heads: as in `parse_variants`.

    Raises:
        UserError: anything else.
    """
    if isinstance(entries, list | tuple) and all(isinstance(entry, str) for entry in entries):
        return parse_variants(entries, heads)
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise UserError(
            f"variants: {entries!r} is neither a list of texts nor a mapping by name; see "
            "docs/benchmarking.md"
        )
    variants = []
    for name, entry in entries.items():
        if entry is None:
            variants.append(_parse(name, heads))
        elif isinstance(entry, str):
            variants.append(dataclasses.replace(_parse(entry, heads), name=_name(name)))
        else:
            variants.append(_of_mapping(name, entry))
    return _checked(variants)


def missing_requirement(variant: Variant, vllm_version: str) -> str | None:
    """What a variant lacks on this machine, in one line; None if nothing.

    Args:
        variant: any.
        vllm_version: such as ``0.32.0+cpu``.
    """
    speculative = variant.speculative or {}
    if variant.name == VLLM_CHAIN and not vllm_version.startswith("0.32."):
        return f"vLLM {vllm_version} has no Medusa of its own; 0.32 has"
    if speculative.get("method") == "suffix" and not importlib.util.find_spec("arctic_inference"):
        return "package arctic-inference is not installed; run pip install arctic-inference"
    model = speculative.get("model")
    if isinstance(model, str) and not Path(model).exists() and not _HUB_NAME.fullmatch(model):
        return f"no such file or directory: {model}"
    return None


def with_built_in_heads(variant: Variant, model: str, folder: Path) -> Variant:
    """Complete ``vllm-chain``: write the heads as vLLM's own Medusa reads them.

    Args:
        variant: the variant named `VLLM_CHAIN`; it names its heads, or the model's own are taken.
        model: the target model.
        folder: an existing directory to write into.

    Raises:
        UnavailableError: heads that vLLM's format cannot hold.
    """
    from vllm_medusa.heads import load_heads
    from vllm_medusa.heads.io.write import needs_lm_head, save_heads, with_target_lm_head
    from vllm_medusa.target.config import read_lm_head, read_target

    heads = str((variant.speculative or {}).get("model", model))
    try:
        target = read_target(model)
        checkpoint = load_heads(
            heads, target_hidden_size=target.hidden_size, target_vocab_size=target.vocab_size
        )
        if needs_lm_head(checkpoint, "vllm"):
            checkpoint = with_target_lm_head(checkpoint, read_lm_head(target))
        save_heads(checkpoint, folder / "heads", "vllm")
    except UserError as exc:
        raise UnavailableError(f"the heads cannot be converted: {exc}") from None
    num_heads = checkpoint.spec.num_heads
    config_file = folder / "heads" / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["num_lookahead_tokens"] = num_heads  # without it vLLM 0.32 does not find the count
    config_file.write_text(json.dumps(config), encoding="utf-8")
    speculative = {
        "method": "medusa",
        "model": str(folder / "heads"),
        "num_speculative_tokens": num_heads,
    }
    return dataclasses.replace(variant, speculative=speculative, converted_from=heads)


def _parse(text: str, heads: str | None) -> Variant:
    kind, has_value, value = text.partition("=")
    medusa = {"method": "medusa"} | ({} if heads is None else {"model": heads})
    if has_value and value.lstrip().startswith("{"):
        return _of_json(kind, value)
    if has_value and not value:
        raise UserError(f"variant {text!r} has nothing after '='; give one of {KINDS}")
    if kind == "tree":
        tree: dict[str, Any] = {"tree": value} if has_value else {}
        if value.isdigit():
            tree = {"num_speculative_tokens": int(value)}
        return Variant(name=text, speculative=medusa | tree)
    if kind == VLLM_CHAIN:
        model = {"model": value} if has_value else {}
        environment = {"VLLM_PLUGINS": ""}
        return Variant(name=kind, speculative=medusa | model, environment=environment)
    if kind in _WITH_PATH and has_value:
        speculative = {"method": kind, "model": value, "num_speculative_tokens": NUM_DRAFTS}
        return Variant(name=kind, speculative=speculative)
    plain = {
        BASELINE: Variant(name=kind),
        "chain": Variant(name=kind, speculative=medusa | {"tree": "chain"}),
        "ngram": Variant(name=kind, speculative=_NGRAM),
        "suffix": Variant(name=kind, speculative={"method": "suffix"}),
    }
    if has_value or kind not in plain:
        raise UserError(f"variant {text!r} is unknown; give one of {KINDS}")
    return plain[kind]


def _of_json(name: str, value: str) -> Variant:
    try:
        speculative = json.loads(value)
    except ValueError as exc:
        raise UserError(f"variant {name!r}: its JSON does not parse ({exc})") from None
    return _of_mapping(name, {"speculative_config": speculative})


def _of_mapping(name: str, entry: Any) -> Variant:
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
        raise UserError(f"variant {name!r} is {entry!r}; give a text or a mapping")
    try:
        given = _Entry(**entry)
    except UserError as exc:
        raise UserError(f"variant {name!r}: {exc}") from None
    speculative = given.speculative_config or {}
    is_lossless = speculative.get("acceptance") != "typical"
    return Variant(
        name=_name(name),
        speculative=speculative or None,
        llm_options=given.llm_options or {},
        environment={key: str(value) for key, value in (given.environment or {}).items()},
        is_lossless=is_lossless if given.lossless is None else given.lossless,
    )


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(f"variant name {name!r}: give 1 to 60 letters, digits or any of '.,+:@_- '")
    return name


def _checked(variants: list[Variant]) -> list[Variant]:
    """Put the baseline first; refuse names given twice."""
    by_name: dict[str, Variant] = {}
    for variant in variants:
        if variant.name in by_name:
            raise UserError(
                f"two variants are named {variant.name!r}; name one of them, as in "
                "'other={\"method\": ...}'"
            )
        by_name[variant.name] = variant
    baseline = by_name.pop(BASELINE, Variant(name=BASELINE))
    if baseline.speculative is not None:
        raise UserError(
            "the variant 'baseline' is what others are measured against; it cannot "
            "speculate: give that variant another name"
        )
    return [baseline, *by_name.values()]
