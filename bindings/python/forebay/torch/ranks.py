"""Facts about ranks, as torch knows them. The core decides what they mean."""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch.utils.data import DistributedSampler


def process_group() -> tuple[int, int] | None:
    """Rank and size of the group of torch.distributed, or None where there is none."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.get_rank(), dist.get_world_size()


def sampler_facts(sampler: DistributedSampler[Any]) -> tuple[int, int, int, bool]:
    """Rank, number of ranks, seed, and whether the sampler drops the last samples."""
    return sampler.rank, sampler.num_replicas, sampler.seed, sampler.drop_last


def dimensions_of(mesh: Any) -> list[tuple[str | None, int, int]]:
    """Name, rank of this process and size of each dimension of `mesh`."""
    names = mesh.mesh_dim_names or (None,) * mesh.ndim
    return [(name, mesh.get_local_rank(dim), mesh.size(dim)) for dim, name in enumerate(names)]
