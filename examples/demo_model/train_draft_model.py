#!/usr/bin/env python3
"""Train a small draft model for the demo's target, for vLLM's ``draft_model`` speculation.

A Llama of two narrow layers, with the target's tokenizer, learns the target's distributions on
the target's own greedy text and on real text. Its embedding starts as the target's, projected
onto its main directions. Its keys and values have the target's shape, so that vLLM keeps both in
one KV-cache group.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from common import keep_freed_memory, run_script
from drafter_training import (
    add_arguments,
    check_arguments,
    distillation_loss,
    target_distribution,
    train,
    training_text,
    write_provenance,
)
from target import load_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, out="demo/draft-model", steps=2000)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=2)
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    return arguments


def build_draft_model(target: PreTrainedModel, arguments: argparse.Namespace) -> LlamaForCausalLM:
    """A narrow Llama whose tied embedding is the target's, projected."""
    config = LlamaConfig(
        vocab_size=target.config.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=target.config.num_key_value_heads,
        num_key_value_heads=target.config.num_key_value_heads,
        head_dim=target.config.head_dim,
        max_position_embeddings=target.config.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=target.config.bos_token_id,
        eos_token_id=target.config.eos_token_id,
        pad_token_id=target.config.pad_token_id,
        attn_implementation="sdpa",
    )
    draft = LlamaForCausalLM(config)
    embedding = target.get_input_embeddings().weight
    directions = torch.linalg.svd(embedding, full_matrices=False).Vh[: arguments.hidden_size]
    with torch.no_grad():
        draft.get_input_embeddings().weight.copy_(embedding @ directions.T)
    return draft


def save(draft: LlamaForCausalLM, arguments: argparse.Namespace) -> None:
    """Write the model as bfloat16; vLLM takes the target's tokenizer."""
    draft.bfloat16()
    draft.generation_config.do_sample = False
    arguments.out.mkdir(parents=True, exist_ok=True)
    draft.save_pretrained(arguments.out)


def run(arguments: argparse.Namespace) -> None:
    """Make the text, train and write."""
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    target = load_model(arguments.model)
    text = training_text(target, arguments)
    draft = build_draft_model(target, arguments)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = target(input_ids=tokens, use_cache=False).logits
            wanted = target_distribution(logits, arguments.temperature)
        return distillation_loss(wanted, draft(input_ids=tokens, use_cache=False).logits)

    positions_seen = train(draft, loss_of, text, arguments)
    save(draft, arguments)
    seconds = time.perf_counter() - started
    write_provenance(draft, text, positions_seen, seconds, arguments)
    print(f"draft model of {draft.num_parameters()} parameters written to {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_script(lambda: run(parse_arguments())))
