"""Heads converted for vLLM's own Medusa draft, on the real engine, what our module drafts.

vLLM 0.32 has Medusa of its own (a chain of top-1 guesses), 0.33 has none: the test is skipped
there. The engines run in a process of their own with plugins off, so that the Medusa is vLLM's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.checkpoints import make_heads, write_fasterdecoding, write_tgi, write_vllm
from vllm_medusa.cli import main as cli
from vllm_medusa.heads import MedusaHeads, head_logits, load_heads
from vllm_medusa.target.config import read_lm_head, read_target

pytestmark = pytest.mark.engine

NUM_HEADS = 3

# Runs vLLM's built-in Medusa with one heads directory after the other, and saves for each the
# hidden states that its heads read and the tokens that they drafted.
ENGINE = """
import json, sys
import torch
from vllm import LLM, SamplingParams
from vllm.v1.spec_decode.medusa import MedusaProposer

propose = MedusaProposer.propose
steps = []

def record(self, *args, **kwargs):
    drafts = propose(self, *args, **kwargs)
    hidden = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    steps.append((hidden.clone(), drafts.clone()))
    return drafts

MedusaProposer.propose = record
model, cases, num_heads, out = json.loads(sys.argv[1])
prompts = [{"prompt_token_ids": [7 * i + j for j in range(5 + i)]} for i in range(4)]
greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
recorded = {}
for case, heads in cases.items():
    llm = LLM(
        model=model,
        speculative_config={
            "method": "medusa", "model": heads, "num_speculative_tokens": num_heads
        },
        skip_tokenizer_init=True,
        max_model_len=256,
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        num_gpu_blocks_override=100,
    )
    steps.clear()
    llm.generate(prompts, greedy, use_tqdm=False)
    recorded[case] = [torch.cat(column) for column in zip(*steps)]
    llm.llm_engine.engine_core.shutdown()
torch.save(recorded, out)
"""

Recorded = dict[str, tuple[Path, list[torch.Tensor]]]


def write_sources(directory: Path) -> dict[str, Path]:
    """Heads in three formats, each with something that vLLM's loader gets wrong or lacks."""
    sizes: dict[str, Any] = {
        "num_heads": NUM_HEADS,
        "hidden_size": tiny.HIDDEN_SIZE,
        "vocab_size": tiny.VOCAB_SIZE,
    }
    cases = {
        "layers and biases": (write_fasterdecoding, make_heads(num_layers=2, **sizes)),
        "no biases": (write_vllm, make_heads(has_bias=False, **sizes)),
        "target lm_head": (write_tgi, make_heads(lm_head="target", **sizes)),
    }
    for _, heads in cases.values():  # small enough that both terms of x + SiLU(...) matter
        for name in heads.tensors.keys() & {"blocks.weight", "blocks.bias"}:
            heads.tensors[name] *= 0.1
    return {case: write(directory / case, heads) for case, (write, heads) in cases.items()}


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """For each case the heads before conversion, and [N, H] hidden states and [N, K] drafts."""
    if find_spec("vllm.v1.spec_decode.medusa") is None:
        pytest.skip("this vLLM has no Medusa of its own")
    directory = tmp_path_factory.mktemp("heads-in-vllm")
    sources = write_sources(directory / "sources")
    converted = {}
    for case, source in sources.items():
        converted[case] = str(directory / "converted" / case)
        options = ["--to", "vllm", "--model", str(tiny_model)]
        assert cli.main(["convert", str(source), converted[case], *options]) == 0
    out = directory / "drafts.pt"
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            ENGINE,
            json.dumps([str(tiny_model), converted, NUM_HEADS, str(out)]),
        ],
        env=os.environ | {"VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    drafts = torch.load(out, weights_only=True)
    return {case: (source, drafts[case]) for case, source in sources.items()}


@pytest.mark.parametrize("case", ["layers and biases", "no biases", "target lm_head"])
def test_vllm_drafts_what_our_heads_draft(recorded: Recorded, tiny_model: Path, case: str) -> None:
    source, (hidden, theirs) = recorded[case]
    heads = load_heads(source)
    weight = heads.tensors.get("lm_head.weight")
    if weight is None:
        weight = read_lm_head(read_target(str(tiny_model)))
    features = MedusaHeads.from_checkpoint(heads, torch.float32)(hidden)
    ours = head_logits(features, weight=weight).argmax(-1).T
    assert len(ours) > 40
    assert len(ours.unique()) > 20  # not one token over and over
    assert torch.equal(ours, theirs.long())
