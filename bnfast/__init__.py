"""bnfast: train a CNN through its BatchNorm layers alone, fast and in little memory (arXiv 2003.00152).

    model = bnfast.convert(torchvision.models.resnet50())     # same model, frozen convolutions fused with BatchNorm
    optimizer = torch.optim.SGD(bnfast.affine_parameters(model), lr=0.1, momentum=0.9)

The path of a call: a planned block's forward (nn) -> frozen_conv_bn_act (ops) -> a backend's phase (csrc/, reference) -> kernel.
"""

from . import models, nn, ops
from .affine import load_affine, save_affine
from .conversion import Report, convert, explain, revert
from .dispatch import backends, use_backend
from .freezing import affine_parameters, freeze, freeze_statistics
from .random_weights import merge_random_weights, train_random_weights
from .tuning import tune
from .weights import clear_cache

__version__ = "0.1.0"

__all__ = [
    "Report",
    "affine_parameters",
    "backends",
    "clear_cache",
    "convert",
    "explain",
    "freeze",
    "freeze_statistics",
    "load_affine",
    "merge_random_weights",
    "models",
    "nn",
    "ops",
    "revert",
    "save_affine",
    "train_random_weights",
    "tune",
    "use_backend",
]
