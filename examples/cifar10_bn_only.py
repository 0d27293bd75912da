"""Trains a CIFAR-10 ResNet through its gammas and betas alone, as in arXiv 2003.00152: one device, plain PyTorch.

    python examples/cifar10_bn_only.py --data DIR [--download]

DIR holds cifar-10-batches-py. bnfast.convert is the only line that plain PyTorch would do without.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

import bnfast


class Block(nn.Module):
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Depth 6n + 2, widths 16, 32 and 64."""

    def __init__(self, depth):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, channels = [], 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                blocks.append(Block(channels, width, 1 if channels == width else 2))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        out = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(out.mean((2, 3)))


def initialise_and_freeze(model):
    """Random features, kaiming normal; gamma ~ U[0, 1), beta = 0. Only these two learn."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(isinstance(module, nn.BatchNorm2d))
    return model


def loaders(args):
    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise]
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4), *to_float])
    train = datasets.CIFAR10(args.data, train=True, transform=augment, download=args.download)
    test = datasets.CIFAR10(args.data, train=False, transform=v2.Compose(to_float))
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    return (
        DataLoader(train, args.batch_size, shuffle=True, **workers),
        DataLoader(test, 256, **workers),
    )


def accuracy(model, loader, device):
    model.eval()
    right = count = 0
    with torch.no_grad():
        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last)
            right += (model(images).argmax(1).cpu() == labels).sum().item()
            count += len(labels)
    return right / count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train, test = loaders(args)
    model = initialise_and_freeze(ResNet(args.depth))
    model = model.to(args.device, memory_format=torch.channels_last)
    model = bnfast.convert(model)
    learned = [p for p in model.parameters() if p.requires_grad]
    print(f"ResNet-{args.depth}: {sum(p.numel() for p in learned):,} parameters learn")
    optimizer = torch.optim.SGD(learned, lr=args.lr, momentum=0.9, weight_decay=1e-4)
    drops = [args.epochs // 2, args.epochs * 3 // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)

    for epoch in range(1, args.epochs + 1):
        model.train()
        start = time.perf_counter()
        total = 0.0
        for images, labels in train:
            images = images.to(args.device, memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        schedule.step()
        print(
            f"epoch {epoch}: loss {total / len(train.dataset):.4f}, "
            f"test accuracy {accuracy(model, test, args.device):.2%}, "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
