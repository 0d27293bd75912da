"""Which parameters train: the configurations of the paper (arXiv 2003.00152), found by module type
and structure.

Names are never asked what a layer is: reproductions that filtered by "bn" in the name lost the
BatchNorms of the shortcuts.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

CONFIGURATIONS = (
    "all",
    "bn",
    "bn+output",
    "bn+shortcut+output",
    "shortcut+output",
    "output",
    "none",
    "all-but-bn",
    "gamma",
    "beta",
)

_AFFINE = "BatchNorm with gamma and beta"


def freeze(model: nn.Module, train: str = "bn") -> nn.Module:
    """Sets requires_grad of every parameter as one of the paper's configurations says, and returns
    the model.

    ======================  ==================================================================
    train                   what trains
    ======================  ==================================================================
    "all"                   everything
    "bn"                    gamma and beta of every BatchNorm (stem and shortcuts included)
    "bn+output"             these and the output layer
    "bn+shortcut+output"    these and the 1x1 convolutions on the residual bypasses
    "shortcut+output"       the bypass convolutions and the output layer, no BatchNorm
    "output"                the output layer
    "none"                  nothing
    "all-but-bn"            everything except gamma and beta
    "gamma"                 the gammas alone
    "beta"                  the betas alone
    ======================  ==================================================================

    Running statistics are no parameters: they keep following the data in training mode in every
    configuration (:func:`freeze_statistics` stops them). Single weights of convolutions train through
    :func:`bnfast.random_weights.train_random_weights`. See :func:`affine_parameters`, :func:`output_layers` and
    :func:`shortcut_convolutions` for what counts as which part.

    Raises ValueError, before anything is changed, for an unknown configuration and for a part that
    the model lacks.
    """
    if train not in CONFIGURATIONS:
        raise ValueError(f"train must be one of {', '.join(CONFIGURATIONS)}, not {train!r}")
    if train in ("all", "all-but-bn"):
        trained = {id(parameter) for parameter in model.parameters()}
    else:
        trained = set()
    if train == "all-but-bn":
        trained -= {id(p) for p in _required(affine_parameters(model), _AFFINE, train)}
    parts = train.split("+")
    if "bn" in parts:
        trained |= {id(p) for p in _required(affine_parameters(model), _AFFINE, train)}
    for part, name in (("gamma", "weight"), ("beta", "bias")):
        if part in parts:
            found = _batchnorm_parameters(model, (name,))
            trained |= {id(p) for p in _required(found, f"BatchNorm with {part}", train)}
    if "output" in parts:
        layers = _required(output_layers(model), "Linear or convolution as output layer", train)
        trained |= {id(p) for layer in layers for p in layer.parameters()}
    if "shortcut" in parts:
        convs = _required(shortcut_convolutions(model), "1x1 convolution on a shortcut", train)
        trained |= {id(p) for conv in convs for p in conv.parameters()}
    for parameter in model.parameters():
        # Integer parameters (packed, quantised) cannot train; requires_grad_(True) raises on them.
        differentiable = parameter.is_floating_point() or parameter.is_complex()
        parameter.requires_grad_(differentiable and id(parameter) in trained)
    return model


def _required(found: list, what: str, train: str) -> list:
    if not found:
        raise ValueError(f"train={train!r} needs a {what}, and the model has none")
    return found


def affine_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The gammas and betas of every BatchNorm in definition order, each [C], once each: what to
    give to the optimiser.

    Chosen by type: BatchNorm1d/2d/3d, SyncBatchNorm and any subclass (bnfast's own, timm's
    BatchNormAct2d). A BatchNorm with affine=False has none. Never raises; the list is empty for a
    model without BatchNorm.
    """
    return _batchnorm_parameters(model, ("weight", "bias"))


def _batchnorm_parameters(model: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for name in names:
                parameter = getattr(module, name)
                if parameter is not None:
                    parameters.setdefault(id(parameter), parameter)
    return list(parameters.values())


def freeze_statistics(model: nn.Module) -> nn.Module:
    """Puts every BatchNorm into evaluation mode, in place, and returns the model: running statistics normalise
    and no longer follow the data, while gamma and beta train as before.

    ``model.train()`` undoes it, so call it after each ``model.train()``.

    Raises ValueError, before anything is changed, for a BatchNorm without running statistics, which takes
    those of the batch in either mode.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name, norm in norms.items():
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(f"the BatchNorm {name!r} has no running statistics to freeze")
    for norm in norms.values():
        norm.eval()
    return model


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that produce the logits: one for almost every model, several for one with several
    heads, or none.

    A model with timm's ``get_classifier()`` says itself where its head is. In any other model the
    head is the whole model without auxiliary heads (torchvision calls them ``aux...`` and defines
    some of them last). Of a head, the output layer is the last Linear in definition order; of one
    without a Linear, the last convolution.
    """
    if callable(getattr(model, "get_classifier", None)):
        classifier = model.get_classifier()
        heads = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
        found = [_last_weight_layer(head.modules()) for head in heads if head is not None]
    else:
        modules = (
            module
            for name, module in model.named_modules()
            if not any(part.lower().startswith("aux") for part in name.split("."))
        )
        found = [_last_weight_layer(modules)]
    return [layer for layer in found if layer is not None]


def _last_weight_layer(modules: Iterable[nn.Module]) -> nn.Module | None:
    last: nn.Module | None = None
    for module in modules:
        is_convolution = isinstance(module, _ConvNd) and not isinstance(last, nn.Linear)
        if isinstance(module, nn.Linear) or is_convolution:
            last = module
    return last


def shortcut_convolutions(model: nn.Module) -> list[nn.Module]:
    """The 1x1 convolutions on residual bypasses, in definition order: ResNet's projection
    shortcuts.

    Found by structure. Each block that holds a 1x1 convolution is traced alone, its children being
    opaque. Where two values are joined (added, or passed together to one child, as in ``unit(x,
    residual)``), the way from one of them back to a value that both come from is a bypass if it is
    a plain chain holding exactly one convolution, 1x1 and ungrouped, and the other way holds more.
    Blocks that cannot be traced hold none as far as this function sees. Nothing is run or changed.
    """
    found: set[int] = set()
    for block in model.modules():
        if any(_is_pointwise(module) for module in block.modules() if module is not block):
            found.update(id(conv) for conv in _bypass_convolutions(block))
    return [module for module in model.modules() if id(module) in found]


def _is_pointwise(module: nn.Module) -> bool:
    return (
        isinstance(module, _ConvNd)
        and module.groups == 1
        and all(size == 1 for size in module.kernel_size)
    )


class _BlockTracer(fx.Tracer):
    """Records the calls that one module's forward makes, with every child a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def normalised_convolutions(model: nn.Module) -> list[nn.Module]:
    """The convolutions whose output goes straight into a BatchNorm, in definition order.

    Found by structure: each block is traced alone, its children being opaque, and a convolution and a
    BatchNorm that are both its children belong together where one call feeds the other. Blocks that cannot
    be traced hold none as far as this function sees. Nothing is run or changed.
    """
    found: set[int] = set()
    for block in model.modules():
        if any(isinstance(child, _BatchNorm) for child in block.children()):
            try:
                graph = _BlockTracer().trace(block)
            except Exception:
                # As in _bypass_convolutions.
                continue
            for node in graph.nodes:
                if _called(block, node, _BatchNorm) and node.all_input_nodes:
                    conv = _called(block, node.all_input_nodes[0], _ConvNd)
                    found.update([id(conv)] if conv is not None else [])
    return [module for module in model.modules() if id(module) in found]


def _called(block: nn.Module, node: fx.Node, kind: type) -> nn.Module | None:
    """The child that a node calls, if it is of that kind."""
    if node.op != "call_module":
        return None
    module = block.get_submodule(node.target)
    return module if isinstance(module, kind) else None


_ADDITIONS = (operator.add, operator.iadd, torch.add)


def _bypass_convolutions(block: nn.Module) -> Iterator[nn.Module]:
    try:
        graph = _BlockTracer().trace(block)
    except Exception:
        # Tracing runs the block's own code on stand-ins for tensors, which can fail in any way.
        return
    convolutions = {node: _convolutions_in(block, node) for node in graph.nodes}
    for join in graph.nodes:
        operands = join.all_input_nodes
        adds = join.target in _ADDITIONS or (
            join.op == "call_method" and join.target in ("add", "add_")
        )
        if len(operands) != 2 or not (adds or join.op == "call_module"):
            continue
        for bypass, main in (operands, reversed(operands)):
            main_nodes = _ancestors(main)
            chain = []
            node = bypass
            while node not in main_nodes and len(node.all_input_nodes) == 1:
                chain.append(node)
                node = node.all_input_nodes[0]
            if node not in main_nodes or any(n.target is operator.getitem for n in chain):
                continue
            inside = main_nodes - _ancestors(node)
            on_bypass = [conv for n in chain for conv in convolutions[n]]
            on_main = [conv for n in inside for conv in convolutions[n]]
            if len(on_bypass) == 1 and _is_pointwise(on_bypass[0]) and len(on_main) > 1:
                yield on_bypass[0]


def _convolutions_in(block: nn.Module, node: fx.Node) -> list[nn.Module]:
    if node.op != "call_module":
        return []
    return [m for m in block.get_submodule(node.target).modules() if isinstance(m, _ConvNd)]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and everything it is computed from."""
    seen = {node}
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return seen


def frozen_digest(model: nn.Module) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every parameter that does not require a
    gradient.

    Equal before and after training exactly if no frozen parameter changed in any bit, was renamed,
    or became trainable. Independent of device and memory format.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
            values = parameter.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()
