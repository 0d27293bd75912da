"""Measurements of a model: bytes that autograd keeps for the backward pass, and agreement with the
plain model.
"""

from __future__ import annotations

import copy
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfast.freezing import affine_parameters


def saved_activation_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd holds between the forward and the backward of model(x), without
    parameters and buffers.

    Counts every storage that the graph saved once, at its full size, through
    torch.autograd.graph.saved_tensors_hooks. The forward runs in the mode (training or not) and
    with the requires_grad that the model has now; the loss is not part of it. Buffers (running
    statistics) and the random generators are as before afterwards.
    """
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(model.parameters(), model.buffers())
    }
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = [buffer.detach().clone() for buffer in model.buffers()]
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            # The output keeps the graph alive: addresses of freed storages would be reused.
            output = model(x)
        del output
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
    return sum(saved.values())


class Agreement(NamedTuple):
    """How far two models' BatchNorm gradients are from those of float64, as relative L2 errors of
    the whole vector.
    """

    error: float
    plain_error: float

    @property
    def ok(self) -> bool:
        """Whether the error is of the plain model's order: at most 8 times as large, plus a band of
        1e-3.
        """
        # Written so that NaN is not ok. ReLUs that flip dominate both errors: no tighter bound.
        return self.error <= 8 * self.plain_error + 1e-3


def gradient_agreement(model: nn.Module, plain: nn.Module, x: Tensor, labels: Tensor) -> Agreement:
    """Compares gradients of the mean cross-entropy for all gammas and betas with those of the plain
    model in float64.

    model and plain have the same parameters; x [N, C, H, W] float32, labels int64 [N]. Works on
    copies in training mode.
    """
    exact = _affine_gradient(copy.deepcopy(plain).double(), x.double(), labels)
    scale = exact.norm().clamp_min(torch.finfo(torch.float32).tiny)

    def error(candidate: nn.Module) -> float:
        gradient = _affine_gradient(copy.deepcopy(candidate), x, labels)
        return ((gradient - exact).norm() / scale).item()

    return Agreement(error(model), error(plain))


def _affine_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    parameters = [p.requires_grad_(True) for p in affine_parameters(model)]
    loss = F.cross_entropy(model.train()(x), labels)
    gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([gradient.flatten().double() for gradient in gradients])
