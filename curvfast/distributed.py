"""Collectives over processes: the only module that imports torch.distributed.

Ranks sum separately and communicate when factors are read or eigendecompositions distributed. A
call that communicates says so in its docstring; every rank must make it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from curvfast.errors import DistributedError, InputError, first_line

AUTO = "auto"
Group = Any
"""A process group; None is one process alone."""


def group_of(setting: Any) -> Group:
    """Return the process group that ``setting`` means.

    Args:
        setting: ``"auto"``: the default group where torch.distributed was initialised for more than
            one process; None: no group; or a process group.

    Returns:
        The group, or None for one process alone.

    Raises:
        InputError: If it is something else.
    """
    import torch.distributed as dist

    if setting is None or not dist.is_available():
        return None
    if setting == AUTO:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        return None if alone else dist.group.WORLD
    if not isinstance(setting, dist.ProcessGroup):
        raise InputError(f"group={setting!r}: pass 'auto', None or a process group")
    return setting


def rank_and_size(group: Group) -> tuple[int, int]:
    """Return this process's rank in the group, and how many there are; (0, 1) without one."""
    if group is None:
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(group), dist.get_world_size(group)


def gather(value: Any, group: Group) -> list[Any]:
    """Return the picklable ``value`` of every rank, in rank order; called by all.

    Raises:
        DistributedError: If another rank is gone.
    """
    if group is None:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size(group)
    with _explained("exchange facts"):
        dist.all_gather_object(found, value, group)
    return found


def add_(tensor: Tensor, group: Group) -> None:
    """Replace a tensor, in place, by its sum over all ranks; called by all.

    Raises:
        DistributedError: If another rank is gone.
    """
    if group is None:
        return
    import torch.distributed as dist

    with _explained("add up sums"), _where_it_can_travel(tensor, group) as travelling:
        dist.all_reduce(travelling, group=group)


def broadcast_(tensor: Tensor, source: int, group: Group) -> None:
    """Replace a tensor, in place, by that of rank ``source``; called by all.

    Raises:
        DistributedError: If another rank is gone.
    """
    if group is None:
        return
    import torch.distributed as dist

    with _explained("share a result"), _where_it_can_travel(tensor, group) as travelling:
        dist.broadcast(travelling, dist.get_global_rank(group, source), group=group)


def deal(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Return the rank of each job, balancing the load of the ranks.

    The largest job first, each to the least loaded rank (LPT): at most 4/3 of the optimal maximum
    (Graham, 1969). The result is the same on every rank.
    """
    load = [0.0] * ranks
    owners = {}
    for key in sorted(costs, key=lambda key: (-costs[key], key)):
        owners[key] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[key]] += costs[key]
    return owners


def gathered(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, any other as it is; called by all ranks of its mesh.

    Raises:
        InputError: If its layout is not one that data parallelism makes.
    """
    if not _is_sharded(tensor):
        return tensor
    _require_plain(tensor)
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, any other as it is."""
    part: Tensor = tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def write_(tensor: Tensor, whole: Tensor) -> None:
    """Copy ``whole`` into a tensor, or into this rank's part of it, in place."""
    if not _is_sharded(tensor):
        tensor.copy_(whole)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    # Every rank has the same whole: nothing is sent.
    part = distribute_tensor(whole.to(tensor.dtype), mesh, placements, src_data_rank=None)
    tensor.to_local().copy_(part.to_local())  # type: ignore[attr-defined]


def is_sharded_model(model: nn.Module) -> bool:
    """Return whether a model's forward needs every rank, as FSDP2's does."""
    return any(_is_sharded(parameter) for parameter in model.parameters())


def refuse_layout(name: str, tensor: Tensor, *, sliced: bool = False) -> None:
    """Raise unless a weight is whole, or sharded as data parallelism does.

    Args:
        name: For the message.
        tensor: The parameter.
        sliced: Whether only a slice of it is meant, as of one expert among many.

    Raises:
        InputError: If it is laid out otherwise, or a slice of it is not on every rank.
    """
    if not _is_sharded(tensor):
        return
    _require_plain(tensor, name)
    if sliced:
        raise InputError(
            f"{name} is one expert's slice of a sharded parameter, which cannot be edited in "
            "place: edit the model before fully_shard, or its gathered checkpoint"
        )


def _is_sharded(tensor: Tensor) -> bool:
    # Asked of the tensor: a program without DTensors need not load them.
    return hasattr(tensor, "full_tensor")


def _require_plain(tensor: Any, name: str = "a weight") -> None:
    from torch.distributed.tensor import Replicate, Shard

    names = tensor.device_mesh.mesh_dim_names or ()
    plain = all(
        isinstance(placement, Replicate) or placement == Shard(0) for placement in tensor.placements
    )
    if not plain or "tp" in names:
        raise InputError(
            f"{name} is laid out as {list(tensor.placements)} on a mesh {list(names)}; fully_shard "
            "(FSDP2) and replicated weights are supported, tensor parallelism is not: measure "
            "before parallelize_module"
        )


@contextmanager
def _where_it_can_travel(tensor: Tensor, group: Group) -> Iterator[Tensor]:
    """Yield the tensor, or a copy on a GPU where the group sends from there; copied back after."""
    import torch.distributed as dist

    if tensor.device.type == "cpu" and dist.get_backend(group) == "nccl":
        copy = tensor.to("cuda")
        yield copy
        tensor.copy_(copy)
    else:
        yield tensor


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            f"this rank could not {what} with the others: {first_line(error)}. The likely "
            "cause: another rank died, or did not make the same call; its own error says why. What "
            "was summed here is still here"
        ) from error
