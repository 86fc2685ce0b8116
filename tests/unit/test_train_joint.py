"""Backbone and heads trained together: gradients, phases, rates, adapters, and what is written."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.training import (
    counting_rows,
    make_llama,
    make_settings,
    make_target,
    random_documents,
    save_llama,
    write_rows,
)
from vllm_medusa.cli import main as cli
from vllm_medusa.data.rows import Row
from vllm_medusa.heads import load_heads
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.backbone import Backbone
from vllm_medusa.training.joint_loss import accumulate_joint_gradients
from vllm_medusa.training.loop import Training
from vllm_medusa.training.model import TrainableHeads
from vllm_medusa.training.packing import build_batch
from vllm_medusa.training.perplexity import measure_target
from vllm_medusa.training.run import train
from vllm_medusa.training.settings import TrainSettings

DOCUMENTS = [random_documents(3, seed=1), random_documents(2, seed=2)]
NUM_STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("joint")
    model = save_llama(directory / "model")
    (model / "tokenizer.json").write_text("a tokenizer")
    data = write_rows(directory / "data", counting_rows(60))
    return {"model": str(model), "data": str(data)}


def make(**changes: Any) -> tuple[TrainSettings, TrainableHeads, Backbone]:
    """Heads and a backbone that have both moved away from their start."""
    settings = make_settings(**{"joint": "full", "heads_weight": 0.3, **changes})
    target = make_target()
    backbone = Backbone(target, settings, NUM_STEPS)
    heads = TrainableHeads(settings, target)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*heads.parameters(), *backbone.weights().values()]:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return settings, heads, backbone


def slow_loss(
    heads: TrainableHeads, target: FrozenTarget, rows: list[Row], settings: TrainSettings
) -> tuple[Tensor, Tensor]:
    """L_LM and L_Medusa-1, summed over the rows, as the paper writes them, by autograd."""
    original = make_target()
    lm = torch.zeros(())
    medusa = torch.zeros(())
    for row in rows:
        tokens = torch.from_numpy(row.token_ids).long()
        positions = torch.arange(len(tokens))[None]
        hidden = target.forward(tokens[None], positions)[0]
        before = F.softmax(original.logits(original.hidden(tokens[None], positions)[0]), dim=-1)
        read = heads.in_context(hidden[None], tokens[None], positions)[0]
        features = heads.features(read, tokens.roll(-1)[:, None])
        for t in range(len(tokens) - 1):
            log_p = F.log_softmax(target.project(hidden[t]), dim=-1)
            if row.loss_mask[t + 1]:
                by_kl = -(before[t] * log_p).sum()
                lm = lm + (by_kl if settings.backbone_loss == "kl" else -log_p[tokens[t + 1]])
            for k in range(heads.num_heads):
                if t + 2 + k < len(tokens) and row.loss_mask[t + 2 + k]:
                    log_q = F.log_softmax(heads.logits(features[k, t][None], k)[0], dim=-1)
                    medusa = medusa - settings.decay**k * log_q[tokens[t + 2 + k]]
    return lm, medusa


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize(
    "kind",
    [
        {"joint": "full"},
        {"joint": "full", "backbone_loss": "ce", "lm_head": "own", "root_aware": True},
        {"joint": "lora", "lora_rank": 4, "lora_dropout": 0.0},
        {"joint": "lora", "lora_rank": 4, "lora_dropout": 0.0, "backbone_loss": "ce"},
        {"joint": "full", "prefix_attention": True},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_papers_loss(kind: dict[str, Any], chunk: int) -> None:
    settings, heads, backbone = make(loss="ce", **kind)
    rows = [document for sequence in DOCUMENTS for document in sequence]
    batch = build_batch(DOCUMENTS, 100)
    scale = 1 / len(batch.learnt)
    losses, loss = accumulate_joint_gradients(
        heads, backbone, batch, settings, scale, heads_weight=0.3, noise=0, chunk=chunk
    )
    of_backbone = {name: p.grad for name, p in backbone.trained.items()}
    of_heads = {name: p.grad for name, p in heads.named_parameters()}
    for parameter in [*heads.parameters(), *backbone.trained.values()]:
        parameter.grad = None

    lm, medusa = slow_loss(heads, backbone.target, rows, settings)
    torch.testing.assert_close(loss, (lm * scale).detach(), rtol=1e-4, atol=1e-5)
    weights = settings.decay ** torch.arange(settings.num_heads)
    torch.testing.assert_close((losses * weights).sum(), (medusa * scale).detach())
    ((lm + 0.3 * medusa) * scale).backward()
    for name, parameter in backbone.trained.items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-5, name
        torch.testing.assert_close(of_backbone[name], parameter.grad, rtol=1e-3, atol=1e-5)
    for name, parameter in heads.named_parameters():
        # Their own gradient does not know lambda_0.
        assert parameter.grad is not None
        torch.testing.assert_close(of_heads[name], parameter.grad / 0.3, rtol=1e-3, atol=1e-5)


def test_dropout_is_drawn_from_the_seed_that_is_given() -> None:
    settings, heads, backbone = make(joint="lora", lora_dropout=0.5)
    batch = build_batch(DOCUMENTS, 100)
    one, same, other = (backbone.states(batch, noise).detach() for noise in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    without = backbone.target.hidden(batch.tokens, batch.position_ids).flatten(0, 1)
    assert not torch.allclose(one, without)
    assert heads.num_heads == settings.num_heads


@pytest.mark.parametrize("joint", ["lora", "full"])
def test_original_is_the_target_as_it_was(joint: str) -> None:
    _, _, backbone = make(joint=joint)
    batch, original = build_batch(DOCUMENTS, 100), make_target()
    states = backbone.original_states(batch)
    expected = original.hidden(batch.tokens, batch.position_ids).flatten(0, 1)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(backbone.original_logits(states), original.logits(expected))
    now = backbone.target.hidden(batch.tokens, batch.position_ids).flatten(0, 1)
    assert (now - expected).abs().max() > 0.1


def test_merged_adapters_give_the_same_logits() -> None:
    _, _, backbone = make(joint="lora", lora_rank=4)
    batch, original = build_batch(DOCUMENTS, 100), make_target()
    target = backbone.target
    expected = target.logits(target.hidden(batch.tokens, batch.position_ids))
    before = original.logits(original.hidden(batch.tokens, batch.position_ids))
    merged = backbone.merged()
    logits = merged.logits(merged.hidden(batch.tokens, batch.position_ids))
    assert (logits - before).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert merged.model.state_dict().keys() == make_llama().state_dict().keys()
    assert not any(parameter.requires_grad for parameter in merged.model.parameters())


@pytest.mark.parametrize("joint", ["lora", "full"])
def test_backbone_moves_after_the_warm_up_only_and_at_its_own_rate(
    inputs: dict[str, str], joint: str
) -> None:
    settings = make_settings(
        **inputs, joint=joint, steps=NUM_STEPS, heads_warmup=0.5, warmup=0.0, backbone_lr=1e-4
    )
    training = Training(settings)
    backbone = training.backbone
    assert backbone is not None
    assert backbone.first_step == 3
    batches = training._batches.from_batch(0)
    for step in range(NUM_STEPS):
        before = copy.deepcopy(backbone.weights())
        heads = training._heads.blocks.weight.detach().clone()
        training._step(step, [next(batches)])
        moved = max(
            float((weight - before[name]).abs().max())
            for name, weight in backbone.weights().items()
        )
        heads_moved = float((training._heads.blocks.weight - heads).detach().abs().max())
        if step < 3:
            assert moved == 0
        if step == 3:  # AdamW's first step moves by the rate
            assert moved == pytest.approx(1e-4, rel=0.02)
        assert heads_moved > 1e-3 * (1 - step / NUM_STEPS)


def test_defaults_are_the_papers() -> None:
    by_kl = make_settings(joint="lora", lr=2e-3)
    by_ce = make_settings(joint="lora", backbone_loss="ce")
    assert (by_kl.weight_of_heads, by_ce.weight_of_heads) == (0.01, 0.2)
    assert by_kl.peak_of_backbone == pytest.approx(5e-4)
    assert (by_kl.lora_rank, by_kl.lora_alpha, by_kl.lora_dropout) == (32, 16, 0.05)
    assert by_kl.warmup_share == 0.5
    assert make_settings(joint="lora", heads="h", num_heads=4).warmup_share == 0


def test_heads_weight_rises_to_its_peak_at_the_last_step() -> None:
    _, _, backbone = make(heads_weight_ramp=True, heads_warmup=0.5)
    found = [backbone.heads_weight(step) / 0.3 for step in range(3, NUM_STEPS)]
    assert found == pytest.approx([math.sin(x * math.pi / 6) for x in (1, 2, 3)])
    _, _, steady = make(heads_warmup=0.5)
    assert [steady.heads_weight(step) for step in (3, 5)] == [0.3, 0.3]


def test_perplexity_is_that_of_each_row_alone() -> None:
    target, rows = make_target(), random_documents(7, seed=4)
    nats, hits = [], []
    for row in rows:
        tokens = torch.from_numpy(row.token_ids).long()
        hidden = target.hidden(tokens[None], torch.arange(len(tokens))[None])[0]
        log_p = F.log_softmax(target.logits(hidden), dim=-1)
        for t in range(len(tokens) - 1):
            if row.loss_mask[t + 1]:
                nats.append(-float(log_p[t, tokens[t + 1]]))
                hits.append(int(log_p[t].argmax()) == int(tokens[t + 1]))
    found = measure_target(target, rows, batch_tokens=64)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert found["top_1"] == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize(
    ("kind", "source_format"),
    [
        ({"joint": "lora", "lora_rank": 4}, "merged"),
        ({"joint": "full", "lm_head": "own"}, "merged"),
        ({"joint": "full", "num_layers": 2, "dtype": "bfloat16"}, "merged"),
        (
            {"joint": "lora", "root_aware": True, "selector": True, "selector_rank": 4},
            "native",
        ),
        ({"joint": "lora", "lora_rank": 4, "prefix_attention": True}, "native"),
    ],
    ids=str,
)
def test_model_is_written_with_its_heads(
    inputs: dict[str, str], tmp_path: Path, kind: dict[str, Any], source_format: str
) -> None:
    settings = make_settings(**inputs, steps=8, heads_warmup=0.25, backbone_lr=1e-2, **kind)
    report = train(settings, tmp_path / "out")
    spec = load_heads(tmp_path / "out", target_hidden_size=32, target_vocab_size=50).spec
    assert (spec.source_format, spec.num_heads) == (source_format, 3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["medusa_num_heads"], config["architectures"]) == (3, ["LlamaForCausalLM"])
    assert config["dtype"] == settings.dtype
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "a tokenizer"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    before, after = (report["joint"][when] for when in ("before", "after"))
    assert before["target"] != after["target"]
    assert after["held_out"] == report["held_out"]
    rows = Training(make_settings(**inputs)).dataset.held_out
    assert measure_target(FrozenTarget(model), rows, 96)["perplexity"] == pytest.approx(
        after["target"]["perplexity"], rel=1e-4 if settings.dtype == "float32" else 0.1
    )
    assert len(report["backbone_loss"]) == 6
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| perplexity of the held-out answers | " in page


def test_by_the_command_line_from_heads_that_were_trained_before(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = {"lm_head": "low-rank", "rank": 4, "num_layers": 2, "num_heads": 2}
    train(make_settings(**inputs, steps=4, **kind), tmp_path / "heads")
    command = ["train", "--model", inputs["model"], "--data", inputs["data"], "--joint", "lora"]
    command += ["--heads", str(tmp_path / "heads"), "--dtype", "float32", "--batch-tokens", "96"]
    command += ["--steps", "3", "--held-out", "0.1", "--lora-rank", "4", "--lr", "0.02"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote the model with its heads to {tmp_path / 'out'}")
    assert "perplexity of the target: " in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    given = json.loads((tmp_path / "heads" / "report.json").read_text())
    assert report["joint"]["before"]["held_out"] == given["held_out"]
    assert report["evaluations"][0]["step"] == 0
    assert len(report["backbone_loss"]) == 3
    assert cli.main(["inspect", str(tmp_path / "out"), "--model", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "two low-rank factors per head" in said
    assert "fits: " in said


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"lm_head": "own"},
        {"root_aware": True, "selector": True},
        {"prefix_attention": True, "prefix_window": 9},
    ],
    ids=str,
)
def test_training_goes_on_from_heads_of_every_kind(
    inputs: dict[str, str], tmp_path: Path, kind: dict[str, Any]
) -> None:
    train(make_settings(**inputs, steps=2, selector_rank=4, **kind), tmp_path / "heads")
    checkpoint = load_heads(tmp_path / "heads", target_vocab_size=50)
    training = Training(
        make_settings(**inputs, joint="full", heads=str(tmp_path / "heads"), num_heads=4)
    )
    again = training._heads.checkpoint(torch.float32, "m")
    assert again.tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(again.tensors[n], checkpoint.tensors[n]) for n in again.tensors)
