"""AdamW or Muon, and the schedule of their learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vllm_medusa.training.model import TrainedHeads
from vllm_medusa.training.settings import TrainSettings

_BETAS = (0.9, 0.95)


def rate_factor(step: int, num_steps: int, warmup: float) -> float:
    """Return the learning rate of a step (from 0) over the peak rate.

    It rises linearly over the share `warmup` of the steps, then falls to zero by half a cosine.
    """
    rising = max(1, round(warmup * num_steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, num_steps - rising)))


class HeadsOptimizer:
    """The optimizer of the settings over the heads' parameters.

    With Muon (`torch.optim.Muon`, rates matched to AdamW's), each matrix of the heads before their
    lm_heads is orthogonalised separately, as a view of the stacked weights. Biases, lm_heads and
    selectors get AdamW.

    Args:
        heads: to be trained.
        settings: which optimizer and rates.
    """

    def __init__(self, heads: TrainedHeads, settings: TrainSettings) -> None:
        self._parameters = list(heads.parameters())
        self._clip, self._peak = settings.clip, settings.lr
        layers = [layer for layer in (heads.blocks, heads.prefix) if layer is not None]
        stacked = [matrix for layer in layers for matrix in layer.matrices]
        biases = [bias for layer in layers for bias in layer.biases]
        self._by_muon = stacked if settings.optimizer == "muon" else []
        self._muon_views = [
            nn.Parameter(view) for parameter in self._by_muon for view in _matrices(parameter.data)
        ]
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for parameter in self._parameters:
            if any(parameter is bias for bias in biases):
                vectors.append(parameter)
            elif not any(parameter is other for other in self._by_muon):
                matrices.append(parameter)
        decay = settings.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": group, "weight_decay": rate}
            for group, rate in ((matrices, decay), (vectors, 0.0))
            if group
        ]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=self._peak, betas=_BETAS)
        ]
        if self._muon_views:
            self._optimizers.append(
                torch.optim.Muon(
                    self._muon_views,
                    lr=self._peak,
                    weight_decay=decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    @property
    def gradients(self) -> list[Tensor]:
        """The parameters' gradients."""
        return [p.grad for p in self._parameters if p.grad is not None]

    def step(self, factor: float) -> None:
        """Clip the gradients, change the parameters, forget the gradients.

        Args:
            factor: on the peak learning rate.
        """
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        if self._muon_views:
            gradients = [
                gradient
                for parameter in self._by_muon
                if parameter.grad is not None
                for gradient in _matrices(parameter.grad)
            ]
            for view, gradient in zip(self._muon_views, gradients, strict=True):
                view.grad = gradient
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._peak * factor
            optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> list[dict[str, Any]]:
        """Return all that a resumed run needs."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Take over what `state` returned."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


class BackboneOptimizer:
    """AdamW over a target's weights or adapters, with a peak rate and a clipping of their own.

    Args:
        parameters: to be trained.
        settings: rates.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: TrainSettings) -> None:
        self._parameters = parameters
        self._clip, self._peak = settings.clip, settings.peak_of_backbone
        groups = [
            {"params": [p for p in parameters if (p.dim() > 1) == decays], "weight_decay": rate}
            for decays, rate in ((True, settings.weight_decay), (False, 0.0))
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self._peak, betas=_BETAS
        )

    def step(self, factor: float) -> None:
        """Clip the gradients, change the parameters, forget the gradients.

        Args:
            factor: on the peak learning rate.
        """
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for group in self._adamw.param_groups:
            group["lr"] = self._peak * factor
        self._adamw.step()
        self._adamw.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return self._adamw.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self._adamw.load_state_dict(state)


def _matrices(stacked: Tensor) -> Tensor:
    """[..., out, in] to [count, out, in]."""
    return stacked.view(-1, *stacked.shape[-2:])
