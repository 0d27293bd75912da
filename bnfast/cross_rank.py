"""BatchNorm's statistics over all ranks of a process group: what nn.SyncBatchNorm does, on any device and for any backend.

Forward, one collective of 2C + 1 numbers per layer: every rank contributes its count n, mean and M2, and with
N = sum(n) the merge (Chan, Golub and LeVeque 1983, for k parts at once, in the order of the ranks) is

    mean = sum(n mean_r) / N        M2 = sum(M2_r) + sum(n (mean_r - mean)^2)

A rank without images has n = 0 and takes part. Backward, one collective of 2C numbers: equation (9) of `reference` needs
dgamma / N and dbeta / N over all ranks. The phase divides by its own n, so it is given the sums times n / N.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .reference import rstd_of, update_running_statistics


def group_of(bn: nn.Module) -> Any:
    """The process group over which a module takes its batch statistics now; None where it takes its own alone."""
    if not ("process_group" in bn.__dict__ and bn.training):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def merged(
    count: int,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, rstd, share) over all ranks from this rank's count, mean [C] and M2 [C]; updates the running statistics.

    share [] float64 is this rank's part of all values, n / N.
    """
    # float64: counts above 2^24 are exact, and the merge adds no rounding to speak of.
    exact_count = torch.tensor([count], dtype=torch.float64, device=mean.device)
    own = torch.cat([exact_count, mean.double(), m2.double()])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    counts, means, m2s = torch.stack(parts).split([1, len(mean), len(mean)], 1)
    total = counts.sum()
    all_mean = (counts * means).sum(0) / total.clamp_min(1)
    all_m2 = (m2s + counts * (means - all_mean).square()).sum(0)
    update_running_statistics(
        running_mean, running_var, num_batches_tracked, momentum, all_mean, all_m2, total
    )
    rstd = rstd_of(all_m2 / total.clamp_min(1), eps)
    return all_mean.to(mean.dtype), rstd.to(mean.dtype), count / total.clamp_min(1)


def summed(dgamma: Tensor, dbeta: Tensor, share: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """What `bn_bwd_apply` takes for dgamma and dbeta [C]: the sums over all ranks times this rank's share."""
    both = torch.stack([dgamma, dbeta])
    dist.all_reduce(both, group=group)
    dgamma, dbeta = both * share.to(both.dtype)
    return dgamma, dbeta
