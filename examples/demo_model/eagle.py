"""EAGLE and EAGLE-3 heads for the demo's target, as vLLM runs them.

The other side is vLLM's `model_executor/models/llama_eagle.py` and `llama_eagle3.py`.

A head is one decoder layer. At position t it reads the embedding of token t + 1 and a feature of
position t, and its output stands for the feature of position t + 1; the target's lm_head turns
that into a guess at token t + 2. Features:

- EAGLE (arXiv 2401.15077): what the target's lm_head reads, at first the target's own, then the
  head's outputs.
- EAGLE-3 (arXiv 2503.01840): at first a projection of the target's states after several layers,
  then the head's outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from common import require, write_json
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

Method = Literal["eagle", "eagle3"]
# EAGLE-3 reads the target's residual stream after this many layers: low, middle, high.
AUX_LAYERS = (1, 2, 4)


class Attention(nn.Module):
    """Rotary attention of one layer over the anchors of an unrolled draft."""

    def __init__(self, config: LlamaConfig, input_size: int) -> None:
        super().__init__()
        self.head_dim: int = config.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        q_size = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, q_size, bias=False)
        self.k_proj = nn.Linear(input_size, kv_size, bias=False)
        self.v_proj = nn.Linear(input_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        theta = config.rope_parameters["rope_theta"]
        self.frequencies = theta ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)

    def forward(
        self, x: torch.Tensor, depth: int, drafted: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Attend at draft depth `depth` (from 0): x [batch, anchors, input] to [.., hidden].

        Anchor t stands at position t + depth. It sees depth 0 of the anchors up to t (positions
        that the target has read) and its own keys of every later depth. `drafted` holds keys and
        values by depth, each [batch, kv heads, anchors, head_dim]; this depth's are added to it.
        """
        batch, anchors, _ = x.shape
        shape = (batch, anchors, -1, self.head_dim)
        query = self._rotate(self.q_proj(x).view(shape).transpose(1, 2), depth)
        key = self._rotate(self.k_proj(x).view(shape).transpose(1, 2), depth)
        drafted.append((key, self.v_proj(x).view(shape).transpose(1, 2)))
        groups = query.shape[1] // key.shape[1]
        keys, values = zip(
            *((k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)) for k, v in drafted),
            strict=True,
        )
        scores = query @ keys[0].transpose(-1, -2)
        future = torch.ones(anchors, anchors, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        own = [(query * k).sum(-1, keepdim=True) for k in keys[1:]]
        weights = torch.cat([scores, *own], dim=-1).float() / self.head_dim**0.5
        weights = weights.softmax(dim=-1).to(query.dtype)
        output = weights[..., :anchors] @ values[0]
        for later, value in enumerate(values[1:]):
            output = output + weights[..., anchors + later, None] * value
        return self.o_proj(output.transpose(1, 2).reshape(batch, anchors, -1))

    def _rotate(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        positions = torch.arange(x.shape[2]) + depth
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., hidden] to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """The one layer of a head, with the names that vLLM loads."""

    def __init__(self, config: LlamaConfig, method: Method) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.is_eagle3 = method == "eagle3"
        self.self_attn = Attention(config, input_size=2 * size if self.is_eagle3 else size)
        self.mlp = MLP(config)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=eps)
        if self.is_eagle3:
            self.input_layernorm = nn.RMSNorm(size, eps=eps)
            self.hidden_norm = nn.RMSNorm(size, eps=eps)


class EagleHead(nn.Module):
    """A head of either method, computed for every position of a text as an anchor."""

    def __init__(self, config: LlamaConfig, method: Method) -> None:
        super().__init__()
        self.config, self.method = config, method
        num_features = len(AUX_LAYERS) if method == "eagle3" else 2
        self.fc = nn.Linear(num_features * config.hidden_size, config.hidden_size, bias=False)
        layer = DecoderLayer(config, method)
        if method == "eagle3":
            self.midlayer = layer
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        else:
            self.layers = nn.ModuleList([layer])

    def first_feature(self, states: torch.Tensor) -> torch.Tensor:
        """Feature of the first depth from `target_states`."""
        return self.fc(states) if self.method == "eagle3" else states

    def forward(
        self,
        embeds: torch.Tensor,
        feature: torch.Tensor,
        depth: int,
        drafted: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step of all anchors, [batch, anchors, hidden] each.

        Returns what the lm_head reads and the feature of the next depth.
        """
        if self.method == "eagle3":
            layer, residual = self.midlayer, feature
            x = torch.cat([layer.input_layernorm(embeds), layer.hidden_norm(feature)], dim=-1)
        else:
            layer = self.layers[0]
            x = residual = self.fc(torch.cat([embeds, feature], dim=-1))
        x = residual + layer.self_attn(x, depth, drafted)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        return (self.norm(x), x) if self.method == "eagle3" else (x, x)


def build_head(target: PreTrainedModel, method: Method, intermediate_size: int) -> EagleHead:
    """A fresh head whose attention has the target's shape: one KV-cache group in vLLM."""
    config = LlamaConfig.from_dict(target.config.to_dict())
    config.num_hidden_layers = 1
    config.intermediate_size = intermediate_size
    return EagleHead(config, method)


def load_head(path: Path, target: PreTrainedModel) -> EagleHead:
    """A head as stored, in float32."""
    require(path / "config.json", "train_eagle.py")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    method: Method = "eagle3" if "eagle_config" in config else "eagle"
    head = build_head(target, method, config["intermediate_size"])
    weights = load_file(path / "model.safetensors")
    head.load_state_dict({key: value.float() for key, value in weights.items()})
    return head.eval().requires_grad_(False)


@torch.no_grad()
def target_states(
    target: PreTrainedModel, tokens: torch.Tensor, method: Method
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a head reads of the target, [batch, tokens, features], and what its lm_head reads."""
    residuals: list[torch.Tensor] = []
    hooks = [
        target.model.layers[number - 1].register_forward_hook(
            lambda _module, _inputs, output: residuals.append(output)
        )
        for number in AUX_LAYERS
    ]
    try:
        hidden = target.model(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return (torch.cat(residuals, dim=-1) if method == "eagle3" else hidden), hidden


def save_head(head: EagleHead, model_path: str, out: Path) -> None:
    """Write the weights as bfloat16, and a config; embedding and lm_head are the target's."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {key: value.bfloat16().contiguous() for key, value in head.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = head.config.to_diff_dict()
    config.pop("_name_or_path", None)
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "base_model_name_or_path": model_path,
    }
    if head.method == "eagle3":
        config["architectures"] = ["LlamaForCausalLMEagle3"]
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS)}
    write_json(out / "config.json", config)
