#!/usr/bin/env python3
"""Train an EAGLE or EAGLE-3 head for the demo's frozen target, for vLLM's own speculation.

The head drafts several tokens from every position of the text, fed with its own outputs as it is
when it serves (EAGLE-3 calls it training-time test). The text's own tokens follow; the loss is
the cross entropy to the target's distributions and, for EAGLE, the distance to its features.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
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
from eagle import EagleHead, build_head, save_head, target_states
from target import load_model
from transformers import PreTrainedModel

DEPTH_WEIGHT = 0.8  # a draft counts only when all before it are right


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, out="demo/eagle", steps=1000)
    parser.add_argument("--method", choices=("eagle", "eagle3"), default="eagle")
    parser.add_argument("--depths", type=int, default=3, help="draft steps from every position")
    parser.add_argument("--intermediate-size", type=int, default=704)
    parser.add_argument(
        "--feature-weight", type=float, default=1.0, help="of the distance to the target's features"
    )
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    if not 1 <= arguments.depths < arguments.new_tokens:
        parser.error(f"--depths {arguments.depths}: at least 1 and less than --new-tokens")
    return arguments


def unrolled_loss(
    head: EagleHead, target: PreTrainedModel, tokens: torch.Tensor, arguments: argparse.Namespace
) -> torch.Tensor:
    """Loss over the anchors of tokens [batch, tokens], summed over the draft depths."""
    states, hidden = target_states(target, tokens, head.method)
    lm_head = target.get_output_embeddings().weight
    embeds = target.get_input_embeddings()(tokens)
    with torch.no_grad():
        wanted = target_distribution(hidden @ lm_head.T, arguments.temperature)
    # Every depth has the same anchors, so that all shapes are the same.
    anchors = tokens.shape[1] - arguments.depths
    feature = head.first_feature(states[:, :anchors])
    total, drafted = torch.zeros(()), []
    for depth in range(arguments.depths):
        ahead = slice(depth + 1, depth + 1 + anchors)
        output, feature = head(embeds[:, ahead], feature, depth, drafted)
        loss = distillation_loss(wanted[:, ahead], output @ lm_head.T)
        if head.method == "eagle":
            distance = F.smooth_l1_loss(output.float(), hidden[:, ahead].float())
            loss = loss + arguments.feature_weight * distance
        total = total + DEPTH_WEIGHT**depth * loss
    return total


def run(arguments: argparse.Namespace) -> None:
    """Make the text, train and write."""
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    target = load_model(arguments.model)
    text = training_text(target, arguments)
    head = build_head(target, arguments.method, arguments.intermediate_size)
    positions_seen = train(
        head, lambda tokens: unrolled_loss(head, target, tokens, arguments), text, arguments
    )
    save_head(head, (Path("..") / arguments.model.name).as_posix(), arguments.out)
    seconds = time.perf_counter() - started
    write_provenance(head, text, positions_seen, seconds, arguments)
    print(f"{arguments.method} head written to {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_script(lambda: run(parse_arguments())))
