"""Make a small model cost what a larger one costs, without changing what it says.

The demo model is so small that Python dominates its steps. This widens every MLP and adds decoder
layers, with zero output projections for all that is new: the weights are read and multiplied at
every step, and the outputs stay the same (to rounding). Wide layers measure what weights cost; a
hundred narrow ones would measure what a layer's overhead costs.

    python examples/inflate.py demo/model inflated --parameters 80e6
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

EXTRA_LAYERS = 12
WIDTH_STEP = 256


def main() -> None:
    """Read a Llama, inflate it, check that its outputs are the same, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of a Llama model")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--parameters", type=float, default=80e6, help="about so many (80e6)")
    args = parser.parse_args()
    small = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    large = inflate(small, args.parameters)
    difference = largest_difference(small, large)
    large.to(torch.bfloat16).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(
        f"{small.num_parameters() / 1e6:.1f} M parameters became "
        f"{large.num_parameters() / 1e6:.1f} M; logits differ by {difference:.1e} at most"
    )


def inflate(small: LlamaForCausalLM, parameters: float) -> LlamaForCausalLM:
    """Return a model of about ``parameters`` parameters with the outputs of ``small``."""
    config = small.config
    num_layers = config.num_hidden_layers + EXTRA_LAYERS
    layer = sum(weight.numel() for weight in small.model.layers[0].parameters())
    column = 3 * config.hidden_size
    unwidened = small.num_parameters() + EXTRA_LAYERS * layer
    added = (parameters - unwidened) / (column * num_layers)
    width = round((config.intermediate_size + added) / WIDTH_STEP) * WIDTH_STEP
    width = max(width, config.intermediate_size)
    changed = {"num_hidden_layers": num_layers, "intermediate_size": width}
    torch.manual_seed(0)
    large = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), **changed})).float()
    sources = dict(small.named_parameters())
    with torch.no_grad():
        for name, weight in large.named_parameters():
            copy_into(weight, sources.get(name), name)
    return large.eval()


def copy_into(weight: nn.Parameter, source: nn.Parameter | None, name: str) -> None:
    """Put the small model's weights in the corner of the large one's; silence the rest."""
    is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
    if is_output:
        weight.zero_()
    if source is not None:
        corner = tuple(slice(size) for size in source.shape)
        weight[corner] = source


def largest_difference(small: LlamaForCausalLM, large: LlamaForCausalLM) -> float:
    """Compare the two models' logits on random tokens, in float32."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(small.config.vocab_size, (2, 64), generator=generator)
    with torch.no_grad():
        return (small(tokens).logits - large(tokens).logits).abs().max().item()


if __name__ == "__main__":
    main()
