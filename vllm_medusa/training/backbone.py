"""The backbone: the target as it is trained together with the heads (Medusa-2)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vllm_medusa.errors import UserError
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.optimizer import BackboneOptimizer, rate_factor
from vllm_medusa.training.packing import Batch
from vllm_medusa.training.settings import TrainSettings


class Backbone:
    """A target with weights that are trained: all of them, or low-rank adapters of its decoder.

    The adapters (LoRA) lie on all linear layers of the decoder, in float32. The lm_head has none,
    because heads share it and it may be the embedding too.

    Args:
        target: in float32 if all its weights are to be trained; changed in place.
        settings: how it is trained.
        num_steps: of the whole run.

    Attributes:
        target: computes what the backbone computes at the time.
        trained: the parameters that are trained, by their names in the model.
        first_step: the first step that trains it; those before train the heads alone.

    Raises:
        UserError: the target has no linear layers to adapt.
    """

    def __init__(self, target: FrozenTarget, settings: TrainSettings, num_steps: int) -> None:
        self.target = target
        self._settings, self._num_steps = settings, num_steps
        self.first_step = min(round(settings.warmup_share * num_steps), num_steps - 1)
        self._copy: FrozenTarget | None = None
        if settings.joint == "lora":
            _add_adapters(target, settings)
        else:
            if settings.backbone_loss == "kl":
                original = copy.deepcopy(target.model).to(getattr(torch, settings.dtype))
                self._copy = FrozenTarget(original)
            target.model.requires_grad_(True)
        self.trained = {
            name: parameter
            for name, parameter in target.model.named_parameters()
            if parameter.requires_grad
        }
        self._optimizer = BackboneOptimizer(list(self.trained.values()), settings)

    @property
    def num_trained(self) -> int:
        """Number of weights that are trained."""
        return sum(parameter.numel() for parameter in self.trained.values())

    def is_trained_at(self, step: int) -> bool:
        """Whether a step trains it."""
        return step >= self.first_step

    def heads_weight(self, step: int) -> float:
        """Return lambda_0 at a step that trains the backbone."""
        weight = self._settings.weight_of_heads
        if not self._settings.heads_weight_ramp:
            return weight
        share = (step + 1 - self.first_step) / (self._num_steps - self.first_step)
        return weight * math.sin(share * math.pi / 2)

    def states(self, batch: Batch, noise: int) -> Tensor:
        """Compute [positions, H] hidden states with their graph.

        Args:
            batch: on the target's device.
            noise: seed of the adapters' dropout, so that a resumed run draws the same.
        """
        torch.manual_seed(noise)
        dropout = nn.ModuleList(layer.lora_dropout for _, _, layer in _adapted(self.target.model))
        dropout.train()
        states = self.target.forward(batch.tokens, batch.position_ids)
        dropout.eval()
        return states.flatten(0, 1)

    @torch.no_grad()
    def original_states(self, batch: Batch) -> Tensor:
        """Compute [positions, H] hidden states of the target as it was."""
        layers = [layer for _, _, layer in _adapted(self.target.model)]
        for layer in layers:
            layer.enable_adapters(False)
        states = (self._copy or self.target).hidden(batch.tokens, batch.position_ids)
        for layer in layers:
            layer.enable_adapters(True)
        return states.flatten(0, 1)

    def original_logits(self, states: Tensor) -> Tensor:
        """Compute the logits of the target as it was: [C, H] of its states to [C, V]."""
        return (self._copy or self.target).logits(states)

    def step(self, step: int) -> None:
        """Change what is trained by its gradients, and forget them.

        The rate rises and falls within the steps that train the backbone.
        """
        done, total = step - self.first_step, self._num_steps - self.first_step
        self._optimizer.step(rate_factor(done, total, self._settings.warmup))

    def weights(self) -> dict[str, Tensor]:
        """Return what is trained, for `load_weights`."""
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over what `weights` returned, in place."""
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {"weights": self.weights(), "optimizer": self._optimizer.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.load_weights(state["weights"])
        self._optimizer.load_state(state["optimizer"])

    def merged(self) -> FrozenTarget:
        """Return the finished target in the dtype that it is written in; the backbone is over."""
        model = self.target.model
        for parent, name, layer in list(_adapted(model)):
            layer.merge()
            setattr(parent, name, layer.get_base_layer())
        return FrozenTarget(model.to(getattr(torch, self._settings.dtype)))


def _add_adapters(target: FrozenTarget, settings: TrainSettings) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    decoder = target.model.get_decoder()
    names = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise UserError(
            f"--joint lora: {type(target.model).__name__} has no linear layers to adapt; give "
            "--joint full"
        )
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=names,
    )
    torch.manual_seed(settings.seed)
    inject_adapter_in_model(config, decoder)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    decoder.eval()


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Each module that holds an adapted layer, the layer's name in it, and the layer."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if hasattr(child, "get_base_layer") and hasattr(child, "lora_A"):
                yield parent, name, child
