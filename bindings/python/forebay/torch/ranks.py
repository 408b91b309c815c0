"""Finds the data-parallel rank of this process, as torch knows it."""

from __future__ import annotations

from typing import Any

import torch.distributed

from forebay import _core
from forebay._errors import ConfigError
from forebay._loader import log_notes


def with_ranks(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Adds the rank of torch.distributed to the settings, unless another rank was given."""
    names = {name for name, _ in pairs}
    dist = torch.distributed
    if names & {"dp_rank", "dp_world_size"} or not (dist.is_available() and dist.is_initialized()):
        return pairs
    config, origins, *_ = _core.resolve(pairs, False)
    peers = config["model_parallel_size"]
    if dist.get_world_size() % peers:
        raise ConfigError(f"`model_parallel_size` must divide the {dist.get_world_size()} ranks, found {peers}")
    found = config["dp_rank"], config["dp_world_size"]
    here = dist.get_rank() // peers, dist.get_world_size() // peers
    origin = origins["dp_rank"]
    if origin.startswith("FOREBAY_") or found == here:
        # A variable of forebay is set on purpose. It may differ from torch's rank, because peers of
        # another kind of parallelism read the same rows.
        return pairs
    if not origin.startswith("default"):
        raise ConfigError(
            f"rank {found[0]} of {found[1]} was found in {origin}, but torch.distributed says rank "
            f"{here[0]} of {here[1]}: give `dp_rank` and `dp_world_size`"
        )
    assumed = (
        f"assuming pure data parallel over {here[1]} ranks (from torch.distributed); where tensor-, context- or "
        "pipeline-parallel peers should read the same rows, set `mesh`, `model_parallel_size`, or `dp_rank` and "
        "`dp_world_size`"
    )
    log_notes([], [assumed] if peers == 1 else [], here[0])
    return [*pairs, ("dp_rank", str(here[0])), ("dp_world_size", str(here[1]))]


_DATA_PARALLEL = ("dp_replicate", "dp_shard", "dp", "ddp", "fsdp", "data")


def rank_in(mesh: Any) -> tuple[int, int]:
    """Returns the data-parallel rank and the number of such ranks of this process in `mesh`.

    Of several data-parallel dimensions, the first varies slowest.
    """
    names = tuple(mesh.mesh_dim_names or ())
    dims = [dim for dim, name in enumerate(names) if name in _DATA_PARALLEL]
    if not dims and mesh.ndim == 1:
        dims = [0]
    if not dims:
        raise ConfigError(
            f"`mesh` needs a data-parallel dimension, named {', '.join(_DATA_PARALLEL)}; found {names or 'no names'}: "
            "pass the part of the mesh that is data-parallel, such as mesh['my_dp']"
        )
    rank, size = 0, 1
    for dim in dims:
        rank, size = rank * mesh.size(dim) + mesh.get_local_rank(dim), size * mesh.size(dim)
    return rank, size
