"""The frozen target: its weights, and the greedy text that drafters are trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from common import require
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_model(path: Path) -> PreTrainedModel:
    """The frozen target: the stored weights, computed in float32."""
    require(path / "config.json", "train_base.py")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def greedy_continue(
    model: PreTrainedModel, prompts: torch.Tensor, num_new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue prompts of equal length [batch, prompt] greedily, through end-of-text tokens.

    Returns the tokens [batch, prompt + new] and the hidden states of all but the last of them.
    """
    weight = model.get_output_embeddings().weight
    tokens, hidden, cache, fed = [prompts], [], None, prompts
    for _ in range(num_new_tokens):
        output = model.model(input_ids=fed, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        hidden.append(output.last_hidden_state)
        fed = (hidden[-1][:, -1:] @ weight.T).argmax(dim=-1)
        tokens.append(fed)
    return torch.cat(tokens, dim=1), torch.cat(hidden, dim=1)
