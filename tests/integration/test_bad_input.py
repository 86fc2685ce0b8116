"""A user's mistake is one line that says what is wrong and what to do, and no traceback of ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.integration.command_line import (
    DEMO_MODEL,
    engine_config,
)
from vllm_medusa.errors import UserError
from vllm_medusa.plugin import compat
from vllm_medusa.plugin.identity import medusa_config_of
from vllm_medusa.plugin.support import check_supported

pytestmark = pytest.mark.engine

REMEDY = re.compile(
    r"\b(add|check|copy|export|give|install|leave|lower|must be|name|raise|remove|save|serve|unset"
    r"|use|write)\b"
)


def refusal(model: Path, speculative_config: Any, **arguments: Any) -> str:
    """The message of the refusal, checked for its form."""
    with pytest.raises(UserError) as caught:
        engine_config(model, speculative_config, skip_tokenizer_init=True, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert REMEDY.search(message), message
    return message


def medusa(heads: Path | str, **keys: Any) -> dict[str, Any]:
    return {"method": "medusa", "model": str(heads), **keys}


# The configuration.


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"acceptance": "fast"}, "acceptance='fast' is not supported; use 'lossless'"),
        ({"acceptance": "greedy"}, "acceptance='greedy' is not supported"),
        ({"posterior_threshold": 0.1}, "posterior_threshold=0.1 is for acceptance='typical'"),
        ({"posterior_beta": 0.1}, "'posterior_beta', which method 'medusa' does not"),
        ({"draft_tensor_parallel_size": 1}, "'draft_tensor_parallel_size', which"),
        (
            {"tree": "mc_sim_8b_63"},
            "no tree named 'mc_sim_8b_63'; use 'auto', 'dynamic', 'static', one of chain",
        ),
        ({"tree": "x" * 300}, "no tree named 'xxx"),
        ({"tree": ""}, "no tree named ''"),
        ({"tree": 5}, "tree=5 must be 'auto', a tree's name, a tree file or a list of paths"),
        ({"tree": []}, "the tree has no paths; give at least [[0]]"),
        ({"tree": [0, 1]}, "tree path 0 must be a list of ranks"),
        ({"tree": [[0], ["a"]]}, "tree path ['a'] has rank 'a'"),
        ({"tree": [[0], [-1]]}, "tree path [-1] has rank -1"),
        ({"tree": [[0], []]}, "empty path"),
        ({"tree": [[0], [0, 1], [0]]}, "tree path [0] is given twice; remove one"),
        ({"tree": [[0], [1, 0]]}, "tree path [1, 0] has no parent; add the path [1]"),
        ({"tree": [[0] * d for d in range(1, 6)]}, "the tree is 5 deep (path [0, 0, 0, 0, 0])"),
        ({"tree": [[rank] for rank in range(128)]}, "at most 127 draft tokens"),
        ({"tree": [[0], [384]]}, "asks for rank 384 but a head knows 384 tokens"),
        ({"tree": "missing.json"}, "cannot read the tree file missing.json: No such file"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0 must be a positive integer"),
        ({"num_speculative_tokens": "4"}, "num_speculative_tokens='4' must be a positive"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens=True must be a positive"),
        ({"num_speculative_tokens": 128}, "at most 127 draft tokens"),
        ({"num_speculative_tokens": 9, "tree": "cpu-8"}, "does not agree with the tree cpu-8"),
        ({"num_speculative_tokens": 5, "tree": "chain"}, "does not agree with the tree chain"),
        ({"num_speculative_tokens": 2, "tree": [[0]]}, "given as paths, which has 1 nodes; remove"),
        ({"max_tree_requests": 0}, "max_tree_requests=0 must be a positive integer"),
        ({"model": 3}, "model=3 must be a string"),
        ({"model": "x" * 256}, "no such file or directory; give an existing path"),
        ({"model": "x/" * 3000}, "no such file or directory; give an existing path"),
        ({"model": "~nobody-of-that-name/heads"}, "no such file or directory; give an existing"),
        ({3: "heads"}, "the key 3, which is not a string; use model, revision, tree"),
        (
            {"max-tree-requests": 3, "max_tree_requests": 3},
            "'max-tree-requests' and 'max_tree_requests', which are the same key; remove one",
        ),
        ({"tree": np.array([[0]])}, "tree=array([[0]]) must be 'auto', a tree's name"),
        ({"acceptance": np.array(["a", "b"])}, "is not supported; use 'lossless'"),
        ({"model": None, "revision": "main"}, "revision='main' in speculative_config is that of"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_values(tiny_model: Path, tiny_heads: Path, keys: dict[str, Any], expected: str) -> None:
    assert expected in refusal(tiny_model, {**medusa(tiny_heads), **keys})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON (it is nested too deeply)"),
        ("{}", "has format None; use 'vllm_medusa.tree/1'"),
        ('{"format": "vllm_medusa.tree/1", "paths": 3}', "holds no list of paths"),
        ("[[0], [1, 1]]", "tree path [1, 1] has no parent"),
    ],
)
def test_tree_files(
    tiny_model: Path, tiny_heads: Path, tmp_path: Path, content: str, expected: str
) -> None:
    path = tmp_path / "tree.json"
    path.write_text(content)
    assert expected in refusal(tiny_model, medusa(tiny_heads, tree=str(path)))


def test_schedule_that_is_nested_too_deeply(tiny_model: Path, tmp_path: Path) -> None:
    heads = tiny.make_heads(tmp_path)
    (heads / "medusa_tree_schedule.json").write_text("[" * 100_000)
    message = refusal(tiny_model, medusa(heads))
    assert "medusa_tree_schedule.json is not JSON (it is nested too deeply); calibrate" in message


@pytest.mark.parametrize(
    "speculative_config", [{3: 4}, {"method": np.array(["a", "b"])}, {"method": ["medusa"]}]
)
def test_what_is_not_for_us_is_left_to_vllm(tiny_model: Path, speculative_config: Any) -> None:
    """vLLM's own error, of whatever type, and no traceback that begins in our code."""
    with pytest.raises(Exception) as caught:
        engine_config(tiny_model, speculative_config, skip_tokenizer_init=True)
    assert "vllm_medusa" not in str(caught.traceback[-1].path)


@pytest.mark.parametrize(
    ("speculative_config", "arguments"),
    [
        ({"num_speculative_tokens": 4}, {"spec_tokens": 4}),
        ({}, {"spec_method": "medusa"}),
        ({}, {"spec_model": "elsewhere"}),
        ({}, {"spec_model": "x" * 3000}),
        ({"method": "ngram"}, {"spec_method": "medusa"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_given_twice(
    tiny_model: Path, tiny_heads: Path, speculative_config: Any, arguments: Any
) -> None:
    message = refusal(tiny_model, {**medusa(tiny_heads), **speculative_config}, **arguments)
    assert "are both given" in message


# The heads.

Heads = dict[str, torch.Tensor]


def narrow(tensors: Heads) -> None:
    for name in tensors:
        tensors[name] = tensors[name][..., :64].contiguous()
        if "linear.weight" in name:
            tensors[name] = tensors[name][:64].contiguous()


def few_words(tensors: Heads) -> None:
    for name in tensors:
        if "linear" not in name:
            tensors[name] = tensors[name][:300].contiguous()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (few_words, "for vocabulary size 300, the target model has 384; use heads that were"),
        (narrow, "for hidden size 64, the target model has 128; use heads that were trained"),
        (lambda t: t.pop("1.0.linear.weight"), "tensor '1.0.linear.weight' is missing"),
        (lambda t: t.pop("3.1.weight"), "tensor '3.1.weight' is missing"),
        (lambda t: t.update({"4.bias": torch.ones(1)}), "tensor '4.bias' is no part of 4 heads"),
    ],
)
def test_heads_that_do_not_fit(
    tiny_model: Path,
    tiny_heads: Path,
    tmp_path: Path,
    fault: Callable[[Heads], object],
    expected: str,
) -> None:
    tensors = load_file(tiny_heads / "medusa_lm_head.safetensors")
    fault(tensors)
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    assert expected in refusal(tiny_model, medusa(tmp_path))


def test_heads_of_another_model(tiny_heads: Path) -> None:
    """Heads with their own lm_heads and the demo's, which take the size from config.json."""
    assert "for hidden size 128, the target model has 256" in refusal(
        DEMO_MODEL, medusa(tiny_heads)
    )


def test_damaged_files(tiny_model: Path, tiny_heads: Path, tmp_path: Path) -> None:
    content = (tiny_heads / "medusa_lm_head.safetensors").read_bytes()
    path = tmp_path / "medusa_lm_head.safetensors"
    path.write_bytes(content[:-100])
    assert "truncated or damaged" in refusal(tiny_model, medusa(tmp_path))
    path.unlink()
    mark = tmp_path / "ran"
    code = tmp_path / "medusa_lm_head.pt"
    torch.save({"0.0.linear.weight": torch.ones(1), "code": Payload(mark)}, code)
    assert "pickled code or objects, which are never executed" in refusal(
        tiny_model, medusa(tmp_path)
    )
    assert not mark.exists()


class Payload:
    """Would make a directory if it were unpickled as code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.mark,)


def test_no_heads(tiny_model: Path, tmp_path: Path) -> None:
    assert "no such file or directory; give an existing path" in refusal(
        tiny_model, medusa(tmp_path / "nothing")
    )
    assert "not found on the hub" in refusal(tiny_model, medusa("nobody/nothing"))
    assert "no weights file" in refusal(tiny_model, medusa(tmp_path))
    for bare in ("medusa", {"method": "medusa"}):
        assert 'holds no Medusa heads; name heads with "model": HEADS' in refusal(tiny_model, bare)


# What cannot be combined with Medusa.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"worker_cls": "mine.Worker"}, "worker_cls='mine.Worker' cannot be combined"),
        (
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "pipeline_parallel_size=2 is not supported with Medusa",
        ),
        ({"enable_lora": True}, "enable_lora=True is not supported with Medusa"),
        ({"runner": "pooling"}, "runner='pooling' is not supported with Medusa"),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 4}, "over max_num_batched_tokens=16;"),
        ({"async_scheduling": True}, "async_scheduling=True is not supported with Medusa here"),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size=1.0 is not supported with Medusa: it"),
        (
            {"structured_outputs_config": {"backend": "lm-format-enforcer"}},
            "structured_outputs_config.backend='lm-format-enforcer' is not supported with Medusa",
        ),
        ({"max_num_scheduled_tokens": 16}, "over max_num_scheduled_tokens=16;"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported(
    tiny_model: Path, tiny_heads: Path, arguments: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(
        tiny_model, medusa(tiny_heads, tree="cpu-16"), max_model_len=16, **arguments
    )


LONG_TREE = [[rank] for rank in range(64)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"tree": "cpu-16"}, None),
        ({"tree": LONG_TREE}, "tree='64 nodes' is not supported.*ancestors in 64 bits; use 63"),
        ({"tree": "dynamic"}, None),
        (
            {"tree": "dynamic", "sources": ["text"]},
            "sources=.'text'. is not supported.*does not wait for the host; add 'heads'",
        ),
    ],
    ids=["tree", "too many nodes", "dynamic", "text alone"],
)
def test_v2_runner(
    tiny_model: Path,
    tiny_heads: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: dict[str, Any],
    expected: str | None,
) -> None:
    from vllm.config import VllmConfig

    vllm_config = engine_config(tiny_model, medusa(tiny_heads, **spec), skip_tokenizer_init=True)
    # vLLM itself takes V1 where there is no Triton.
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    config = medusa_config_of(vllm_config)
    assert config is not None
    if expected is None:
        check_supported(vllm_config, config)
    else:
        with pytest.raises(UserError, match=expected):
            check_supported(vllm_config, config)


def test_kv_connectors(tiny_model: Path, tiny_heads: Path) -> None:
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    message = refusal(tiny_model, medusa(tiny_heads), kv_transfer_config=connector)
    assert "kv_transfer_config.kv_connector='ExampleConnector' is not supported" in message
    assert "use tree='chain'" in message
    # A chain has no forks.
    spec = medusa(tiny_heads, tree="chain")
    engine_config(tiny_model, spec, skip_tokenizer_init=True, kv_transfer_config=connector)


SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": tiny.HIDDEN_SIZE,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MLA: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("Mamba", {"state_size": 16}, "recurrent (Mamba-like) states cannot be forked; serve"),
        ("DeepseekV2", MLA, "attention to trees does not support MLA caches yet; use tree='chain'"),
    ],
)
def test_models(
    tiny_heads: Path, tmp_path: Path, name: str, sizes: dict[str, Any], reason: str
) -> None:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **sizes})
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(tmp_path)
    assert reason in refusal(tmp_path, medusa(tiny_heads), max_model_len=512)


def test_other_versions(
    tiny_model: Path, tiny_heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.34.1")
    for spec in ("medusa", medusa(tiny_heads), medusa(tiny_heads, tree="cpu-8")):
        message = refusal(tiny_model, spec)
        assert "supports vLLM 0.32 and 0.33, not 0.34.1; install one of these" in message
    # Whoever does not ask for Medusa is left alone.
    engine_config(tiny_model, skip_tokenizer_init=True)
