"""Trains an ImageNet ResNet through its gammas and betas alone, as in arXiv 2003.00152: plain PyTorch under torchrun.

    torchrun --nproc-per-node 8 examples/imagenet_bn_only.py --data DIR

DIR holds the folders train and val with one folder of JPEGs per class. bnfast.convert is the only line that plain PyTorch
would do without.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import datasets
from torchvision.transforms import v2

import bnfast


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


def loaders(args, ranks):
    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise]
    crop = v2.RandomResizedCrop(args.image_size, scale=(0.1, 1.0), ratio=(0.8, 1.25))
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(), *to_float])
    centre = [v2.Resize(args.image_size * 8 // 7), v2.CenterCrop(args.image_size)]
    train = datasets.ImageFolder(os.path.join(args.data, "train"), augment)
    test = datasets.ImageFolder(os.path.join(args.data, "val"), v2.Compose([*centre, *to_float]))
    options = {"num_workers": args.workers, "pin_memory": torch.cuda.is_available()}
    sampler = DistributedSampler(train, seed=args.seed)
    per_rank = args.batch_size // ranks
    return (
        DataLoader(train, per_rank, sampler=sampler, **options),
        DataLoader(test, per_rank, sampler=DistributedSampler(test, shuffle=False), **options),
        len(train.classes),
    )


def accuracies(model, loader, device):
    """Top-1 and top-5 over all ranks."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad():
        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last)
            logits = model(images)
            best = logits.topk(min(5, logits.shape[1]), 1).indices == labels.to(device)[:, None]
            sums += torch.stack(
                [best[:, 0].sum(), best.sum(), torch.tensor(len(labels), device=device)]
            )
    dist.all_reduce(sums)
    return sums[0].item() / sums[2].item(), sums[1].item() / sums[2].item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds train and val")
    parser.add_argument("--model", default="resnet50", help="a ResNet of torchvision")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=1024, help="over all ranks")
    parser.add_argument("--lr", type=float, default=0.4)
    parser.add_argument("--warmup", type=float, default=5.0, help="epochs")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=8, help="per rank")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(args.seed)  # the same random features on every rank
    train, test, classes = loaders(args, ranks)
    model = initialise_and_freeze(torchvision.models.get_model(args.model, num_classes=classes))
    model = model.to(device, memory_format=torch.channels_last)
    model = bnfast.convert(model)
    learned = [p for p in model.parameters() if p.requires_grad]
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(learned, lr=args.lr, momentum=0.9, weight_decay=1e-4)
    warm = max(1, round(args.warmup * len(train)))
    drops = [args.epochs * part * len(train) for part in (30 / 90, 60 / 90, 80 / 90)]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / warm) * 0.1 ** sum(step >= drop for drop in drops)
    )
    if rank == 0:
        print(f"{args.model}: {sum(p.numel() for p in learned):,} parameters learn", flush=True)

    for epoch in range(1, args.epochs + 1):
        model.train()
        train.sampler.set_epoch(epoch)
        start = time.perf_counter()
        total = torch.zeros((), device=device)
        for images, labels in train:
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = F.cross_entropy(wrapped(images), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        top1, top5 = accuracies(model, test, device)
        if rank == 0:
            print(
                f"epoch {epoch}: loss {total.item() / len(train):.4f}, top-1 {top1:.2%}, "
                f"top-5 {top5:.2%}, {time.perf_counter() - start:.1f} s",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
