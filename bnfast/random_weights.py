"""The paper's baseline of random parameters: k weights per output channel train, everything else is frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnfast.freezing import freeze, normalised_convolutions


class ChosenEntries(nn.Module):
    """Parametrization of a frozen weight [C, *] by k of its entries per output channel, the parameter `values` [C, k].

    Momentum and weight decay of any optimiser see these values alone, so no other entry can move. `index` [C, k] int64
    says where they are in ``weight[c].flatten()``.
    """

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.values = nn.Parameter(weight.detach().flatten(1).gather(1, index))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).scatter(1, self.index, self.values).view(weight.shape)


def train_random_weights(
    model: nn.Module, per_channel: int, generator: torch.Generator | None = None
) -> nn.Module:
    """Freezes everything but `per_channel` weights of each output channel of each convolution in front of a BatchNorm,
    in place, and returns the model.

    The positions are drawn uniformly without replacement, from `generator` (on the CPU) or torch's global one; with 2 per
    channel as many numbers train as BatchNorm has. The model computes what it computed before. Each such weight becomes a
    parametrization (torch.nn.utils.parametrize), so that state_dict holds ``<conv>.parametrizations.weight.original`` and
    ``...weight.0.values``; :func:`merge_random_weights` makes plain weights of them again.

    Raises ValueError, before anything is changed, for per_channel below 1 or above the number of weights that a channel has,
    for a model without such convolutions and for one whose weights are parametrized already.
    """
    if per_channel < 1:
        raise ValueError(f"per_channel must be at least 1, not {per_channel}")
    convolutions = normalised_convolutions(model)
    if not convolutions:
        raise ValueError("the model has no convolution whose output goes into a BatchNorm")
    names = {id(module): name for name, module in model.named_modules()}
    for conv in convolutions:
        if parametrize.is_parametrized(conv):
            raise ValueError(f"the weight of {names[id(conv)]!r} is parametrized already")
        if conv.weight[0].numel() < per_channel:
            raise ValueError(
                f"per_channel is {per_channel}, and a channel of {names[id(conv)]!r} has "
                f"{conv.weight[0].numel()} weights"
            )
    freeze(model, "none")
    for conv in convolutions:
        weight = conv.weight
        # The largest of uniform draws are at places drawn uniformly without replacement.
        draws = torch.rand(weight.shape[0], weight[0].numel(), generator=generator, device="cpu")
        index = draws.topk(per_channel, 1).indices.to(weight.device)
        parametrize.register_parametrization(conv, "weight", ChosenEntries(weight, index))
    return model


def merge_random_weights(model: nn.Module) -> nn.Module:
    """Plain weights again, with the trained entries in their places, in place; returns the model. All weights stay frozen."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(
            module.parametrizations["weight"][0], ChosenEntries
        ):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            module.weight.requires_grad_(False)
    return model
