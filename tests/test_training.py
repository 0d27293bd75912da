"""Training goes the same way with and without convert(): the loss of 20 BN-only steps."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnfast

STEPS = 20


def data(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """20 batches of 32 random images [20, 32, 3, 16, 16] and labels [20, 32]."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(STEPS, 32, 3, 16, 16, generator=gen, dtype=torch.float64).to(dtype)
    return x, torch.randint(10, (STEPS, 32), generator=gen)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, layout=torch.contiguous_format, lr=0.01
) -> Tensor:
    """Losses [STEPS] in float64 of SGD with momentum on gamma and beta."""
    model = model.to(memory_format=layout)
    optimizer = torch.optim.SGD(bnfast.affine_parameters(model), lr=lr, momentum=0.9)
    losses = []
    for x, y in zip(images, labels, strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.contiguous(memory_format=layout)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def plain_model() -> nn.Module:
    return bnfast.freeze(bnfast.models.create("resnet20"), "bn")


@pytest.mark.parametrize(
    "layout", [torch.channels_last, torch.contiguous_format], ids=lambda f: str(f)[6:]
)
def test_losses_stay_in_the_band_of_plain_pytorch(backend, layout):
    """Band: how far plain PyTorch in NCHW and in channels_last, on these images and on images that differ from them by a rounding,
    are from each other and from float64, up to each step.

    Rounding errors grow from step to step and jump where a ReLU's mask flips, by chance earlier in one run than in another:
    hence the floor, the size of one flip. The factor is what a convolution in Winograd's form may round more than the direct one.
    """
    model = plain_model()
    # In an interpreter a step takes a minute.
    batches = [t[: 2 if backend.interpreted else STEPS] for t in data(1)]
    exact = train(copy.deepcopy(model).double(), batches[0].double(), batches[1])
    plain = [
        train(copy.deepcopy(model), images, batches[1], memory_format)
        for images in (batches[0], batches[0] * (1 + 2.0**-23))
        for memory_format in (torch.contiguous_format, torch.channels_last)
    ]
    with bnfast.use_backend(backend.name):
        ours = train(bnfast.convert(model, memory_format=layout), *batches)
    if not backend.interpreted:
        assert exact[-5:].mean() < exact[:5].mean() - 0.05, "nothing was learned"
    plain = torch.stack([exact, *plain])
    spread = plain.amax(0) - plain.amin(0)
    band = 8 * spread.cummax(0).values + 2e-4
    distance = (ours - exact).abs()
    assert bool((distance <= band).all()), f"{distance / band}"


def test_float64_training_is_the_same(backend):
    """Without rounding to speak of, the two trajectories, gammas, betas and running statistics coincide."""
    backend.takes_long()
    model = plain_model().double()
    batches = [t[: 2 if backend.interpreted else 5] for t in data(2, torch.float64)]
    converted = bnfast.convert(model)
    with bnfast.use_backend(backend.name):
        ours = train(converted, *batches)
    theirs = train(model, *batches)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    state = converted.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            state[name], value, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_only_gamma_and_beta_learn():
    model = bnfast.convert(plain_model())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    affine = {id(p) for p in bnfast.affine_parameters(model)}
    train(model, *(t[:3] for t in data(3)))
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (id(parameter) in affine), name
        assert (parameter.grad is not None) == (id(parameter) in affine), name


def test_training_is_reproducible_to_the_bit():
    """Two runs, one and two threads: PyTorch's convolutions and ours sum in an order that depends on the shape alone."""
    model = bnfast.convert(plain_model())
    batches = [t[:3] for t in data(4)]
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        twin = copy.deepcopy(model)
        runs.append((train(twin, *batches), twin.state_dict()))
    for losses, state in runs[1:]:
        assert torch.equal(losses, runs[0][0])
        assert all(torch.equal(value, runs[0][1][name]) for name, value in state.items())
