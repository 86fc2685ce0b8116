"""Variants as the command line and YAML files give them, and what they need."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.results import variant_to_json
from vllm_medusa.bench.settings import Settings, settings_from
from vllm_medusa.bench.variants import (
    UnavailableError,
    Variant,
    missing_requirement,
    parse_variants,
    variants_of_config,
    with_built_in_heads,
)
from vllm_medusa.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "name", "speculative"),
    [
        ("tree", "tree", {"method": "medusa", "model": "H"}),
        ("tree=cpu-16", "tree=cpu-16", {"method": "medusa", "model": "H", "tree": "cpu-16"}),
        ("tree=24", "tree=24", {"method": "medusa", "model": "H", "num_speculative_tokens": 24}),
        ("chain", "chain", {"method": "medusa", "model": "H", "tree": "chain"}),
        (
            "draft_model=D",
            "draft_model",
            {"method": "draft_model", "model": "D", "num_speculative_tokens": 4},
        ),
        ("eagle=E", "eagle", {"method": "eagle", "model": "E", "num_speculative_tokens": 4}),
        ("eagle3=E", "eagle3", {"method": "eagle3", "model": "E", "num_speculative_tokens": 4}),
        ("suffix", "suffix", {"method": "suffix"}),
        ('a={"method": "x", "k": [1]}', "a", {"method": "x", "k": [1]}),
    ],
)
def test_variant(text: str, name: str, speculative: dict[str, Any]) -> None:
    baseline, variant = parse_variants([text], "H")
    assert baseline == Variant(name="baseline")
    assert (variant.name, variant.speculative) == (name, speculative)
    assert variant.is_lossless


def test_baseline_comes_first_and_once() -> None:
    names = [variant.name for variant in parse_variants(["ngram", "baseline", "chain"], None)]
    assert names == ["baseline", "ngram", "chain"]


def test_heads_in_the_models_own_directory() -> None:
    _, variant = parse_variants(["tree"], None)
    assert variant.speculative == {"method": "medusa"}


def test_typical_acceptance_is_lossy() -> None:
    _, variant = parse_variants(['t={"method": "medusa", "acceptance": "typical"}'], None)
    assert not variant.is_lossless


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["trees"], "'trees' is unknown; give one of baseline, tree"),
        (["tree="], "nothing after '='"),
        (["eagle"], "'eagle' is unknown"),
        (["chain=2"], "'chain=2' is unknown"),
        (["a={"], "'a': its JSON does not parse"),
        (["a={} b"], "does not parse"),
        (["tree", "tree"], "two variants are named 'tree'"),
        (["eagle=A", "eagle=B"], "two variants are named 'eagle'"),
        (["a/b={}"], "variant name 'a/b'"),
        (['baseline={"method": "ngram"}'], "cannot speculate"),
    ],
)
def test_unusable_variants(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("{", r"\{")) as error:
        parse_variants(texts, None)
    assert "\n" not in str(error.value)


def test_config_file() -> None:
    variants = variants_of_config(
        {
            "tree": None,
            "small": "tree=cpu-8",
            "mine": {
                "speculative_config": {"method": "ngram"},
                "llm_options": {"max_num_seqs": 4},
                "environment": {"A": 1},
                "lossless": False,
            },
        },
        "H",
    )
    assert [variant.name for variant in variants] == ["baseline", "tree", "small", "mine"]
    assert variants[2].speculative == {"method": "medusa", "model": "H", "tree": "cpu-8"}
    assert variants[3] == Variant(
        name="mine",
        speculative={"method": "ngram"},
        llm_options={"max_num_seqs": 4},
        environment={"A": "1"},
        is_lossless=False,
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (7, "neither a list of texts nor a mapping"),
        ({"a": 7}, "'a' is 7; give a text or a mapping"),
        (
            {"a": {"tree": "x"}},
            "variant 'a': unknown setting 'tree'; known are speculative_config, ",
        ),
        ({"a": {"llm_options": 7}}, "variant 'a': llm_options 7: must be a valid JSON object"),
        ({"a": {1: 2}}, "'a' is {1: 2}; give a text or a mapping"),
        ({"a": {"lossless": "yes"}}, "variant 'a': lossless 'yes': must be a valid boolean"),
    ],
)
def test_unusable_config_entries(entries: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        variants_of_config(entries, None)


def test_missing_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(text: str, version: str = "0.32.0") -> str | None:
        return missing_requirement(parse_variants([text], None)[1], version)

    assert missing("ngram") is None
    assert missing("vllm-chain") is None
    assert missing("vllm-chain", "0.33.0+cpu") == (
        "vLLM 0.33.0+cpu has no Medusa of its own; 0.32 has"
    )
    assert missing(f"eagle={tmp_path}/none") == f"no such file or directory: {tmp_path}/none"
    assert missing(f"eagle={tmp_path}") is None
    assert missing("eagle=owner/name") is None  # a hub name: vLLM will see
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install arctic-inference" in str(missing("suffix"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert missing("suffix") is None


def test_heads_for_vllms_own_chain(tmp_path: Path) -> None:
    model, heads = str(ROOT / "demo" / "model"), str(ROOT / "demo" / "medusa-heads")
    _, variant = parse_variants(["vllm-chain"], heads)
    ready = with_built_in_heads(variant, model, tmp_path)
    assert ready.environment == {"VLLM_PLUGINS": ""}
    assert ready.speculative == {
        "method": "medusa",
        "model": str(tmp_path / "heads"),
        "num_speculative_tokens": 4,
    }
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert config["num_lookahead_tokens"] == 4
    written = variant_to_json(ready, VariantState())["speculative_config"]
    assert written == {**ready.speculative, "model": f"{heads}, converted"}


def test_other_heads_for_vllms_own_chain() -> None:
    _, variant = parse_variants(["vllm-chain=OTHER"], "HEADS")
    assert variant.name == "vllm-chain"
    assert variant.speculative == {"method": "medusa", "model": "OTHER"}


@pytest.mark.parametrize("heads", ["none", "heads"])
def test_heads_that_vllms_own_chain_cannot_have(heads: str, tmp_path: Path) -> None:
    _, variant = parse_variants([f"vllm-chain={ROOT / 'demo' / heads}"], None)
    with pytest.raises(UnavailableError, match="cannot be converted"):
        with_built_in_heads(variant, str(ROOT / "demo" / "model"), tmp_path)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_settings_of_a_file_and_the_command_line(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.yaml",
        "model: M\nheads: H\nbatch_sizes: [1, 2]\nrounds: 7\nrequest_rates: [1, .inf, inf]\n"
        "variants: {tree: , other: tree=cpu-8}\n",
    )
    settings = settings_from({"rounds": 3}, file)
    assert (settings.model, settings.heads, settings.rounds) == ("M", "H", 3)
    assert settings.batch_sizes == (1, 2)
    assert settings.request_rates == (1, float("inf"), float("inf"))
    assert [variant.name for variant in settings.parsed_variants()] == [
        "baseline",
        "tree",
        "other",
    ]
    assert json.loads(json.dumps(settings.to_json()))["request_rates"] == [1, "inf", "inf"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds no mapping"),
        ("a: [", "not YAML"),
        ("modell: M", "unknown setting 'modell'"),
        ("model: M\nbatch_sizes: 3", "--batch-sizes 3: must be a valid list"),
        ("heads: H", "no model given"),
    ],
)
def test_unusable_config_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        settings_from({}, write(tmp_path / "a.yaml", text))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        settings_from({}, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", 0),
        ("min_prompts", 0),
        ("rounds", True),
        ("heads", 7),
        ("prompts", None),
        ("strict", "yes"),
        ("seed", "1"),
        ("max_tokens", -1),
        ("batch_sizes", ()),
        ("batch_sizes", (1, 1)),
        ("batch_sizes", (1, "2")),
        ("concurrency", (0,)),
        ("request_rates", (0.0,)),
        ("request_rates", ("x",)),
        ("dtype", "int8"),
        ("threads", 0),
        ("alive", "some"),
        ("llm_options", [1]),
        ("llm_options", {"speculative_config": {}}),
        ("out", Path(__file__)),
    ],
)
def test_unusable_setting(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}"):
        Settings(model="M", **{name: value})
