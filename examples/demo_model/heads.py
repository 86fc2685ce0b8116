"""Medusa heads that share the target's lm_head, and the greedy text they are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from common import require, write_json
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

HEADS_FILE = "medusa_lm_head.safetensors"


class ResBlock(nn.Module):
    """x + SiLU(W x + b), the identity at initialisation (Medusa paper, section 3.1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., hidden] to the same shape."""
        return x + F.silu(self.linear(x))


def build_heads(num_heads: int, num_layers: int, hidden_size: int) -> nn.ModuleList:
    """Heads whose state has the keys `{head}.{layer}.linear.weight|bias`."""
    return nn.ModuleList(
        nn.Sequential(*(ResBlock(hidden_size) for _ in range(num_layers))) for _ in range(num_heads)
    )


def save_heads(heads: nn.ModuleList, model: PreTrainedModel, model_path: str, out: Path) -> None:
    """Write the weights as bfloat16 and their config."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {key: value.bfloat16().contiguous() for key, value in heads.state_dict().items()}
    save_file(weights, out / HEADS_FILE, metadata={"format": "pt"})
    config = {
        "model_type": "medusa",
        "medusa_num_heads": len(heads),
        "medusa_num_layers": len(heads[0]),
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.config.vocab_size,
        "base_model_name_or_path": model_path,
        "torch_dtype": "bfloat16",
    }
    write_json(out / "config.json", config)


def load_heads(path: Path) -> nn.ModuleList:
    """Heads as stored, in float32."""
    require(path / "config.json", "train_heads.py")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    heads = build_heads(
        config["medusa_num_heads"], config["medusa_num_layers"], config["hidden_size"]
    )
    weights = load_file(path / HEADS_FILE)
    heads.load_state_dict({key: value.float() for key, value in weights.items()})
    return heads.eval()


def load_model(path: Path) -> PreTrainedModel:
    """The frozen target: the stored weights, computed in float32."""
    require(path / "config.json", "train_base.py")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """What the lm_head reads (after the final norm): [batch, num_tokens, hidden]."""
    hidden: torch.Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


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
