"""What each rank of test_distributed.py runs, under torchrun: python ranks.py OUT [death]."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import curvfast
from curvfast import Converged, Corrections, Eigenbasis, Factors, LayerBasis

CLASSES = 5
LAYERS = "*"


class Net(nn.Module):
    """Two layers that read one tensor, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(7, 12), nn.Linear(7, 12)
        self.down = nn.Linear(12, CLASSES)
        # DistributedDataParallel sends buffers before each forward, so all its ranks must make one.
        self.register_buffer("unit", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.gate(x)) * self.up(x) * self.unit)


def model() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [6, 3, 9, 4, 7, 5, 8, 2, 6, 5, 4]
    return [
        (torch.randn(n, 7, generator=generator), torch.randint(CLASSES, (n,), generator=generator))
        for n in sizes
    ]


def share(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """Return uneven shards; with four ranks the last has nothing."""
    cuts = {1: [0, 11], 2: [0, 8, 11], 3: [0, 6, 10, 11], 4: [0, 6, 9, 11, 11]}[world]
    return batches()[cuts[rank] : cuts[rank + 1]]


class Labelled(nn.Module):
    """Takes what collect_from passes, and no label: the wrapped model's logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def driven(net: nn.Module, rank: int, world: int, **options: Any) -> Factors:
    data = [{"x": x, "labels": y} for x, y in share(rank, world)]
    return curvfast.collect_from(net, data, LAYERS, labels="gold", progress=False, **options)


def rotations() -> Eigenbasis:
    """Return the same random orthonormal vectors on every rank."""
    generator = torch.Generator().manual_seed(2)
    vectors = {
        d: torch.linalg.qr(torch.randn(d, d, generator=generator))[0] for d in (7, 12, CLASSES)
    }
    shapes = {"gate": (12, 7), "up": (12, 7), "down": (CLASSES, 12)}
    return Eigenbasis(
        {
            name: LayerBasis(torch.ones(i), vectors[i], torch.ones(o), vectors[o])
            for name, (o, i) in shapes.items()
        }
    )


def corrected(net: nn.Module, rank: int, world: int, **options: Any) -> Corrections:
    """Return corrections of whole batches as one sequence each."""
    data = [{"x": x[None], "labels": y[None]} for x, y in share(rank, world)]
    return curvfast.correct(net, rotations(), data, labels="gold", progress=False, **options)


def looped(net: nn.Module, rank: int, world: int, *, accumulate: bool, **options: Any) -> Factors:
    """Return what a training loop measures; every rank makes as many steps, some on no rows."""
    own = share(rank, world)
    most = max(len(share(r, world)) for r in range(world))
    with curvfast.collect(net, LAYERS, loss_reduction="sum", **options) as curvature:
        for step in range(most):
            x, y = own[step] if step < len(own) else (torch.zeros(1, 7), None)
            quiet = accumulate and step % 2 == 0 and hasattr(net, "no_sync")
            with net.no_sync() if quiet else nullcontext():
                logits = net(x)
                # A rank without data takes part with a loss of no rows.
                loss = logits.sum() * 0 if y is None else cross_entropy(logits, y, reduction="sum")
                loss.backward()
    return curvature.factors()


def main(out: Path, death: bool) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    if death:
        die(rank)
        return
    save(driven(model(), rank, world), out / "driven", rank)
    ddp = DistributedDataParallel(model())
    save(driven(ddp, rank, world), out / "driven-ddp", rank)
    save(looped(ddp, rank, world, accumulate=True, rows=real), out / "looped-ddp", rank)
    fsdp = sharded()
    save(driven(fsdp, rank, world), out / "driven-fsdp", rank)
    assert all(p.grad is None for p in fsdp.parameters())
    assert all(p.requires_grad for p in fsdp.parameters())
    save(looped(fsdp, rank, world, accumulate=False, rows=real), out / "looped-fsdp", rank)
    until = Converged(shared_mass=0.999999, first=2, growth=1.1)
    save(driven(model(), rank, world, until=until), out / "until", rank)
    save(driven(model(), rank, world, marginals=True), out / "marginals", rank)
    save(corrected(model(), rank, world), out / "position", rank)
    spilt = corrected(sharded(), rank, world, per="sequence", spill_every=2)
    save(spilt, out / "sequence", rank)
    spilled = looped(model(), rank, world, accumulate=False, rows=real, spill_every=3)
    save(spilled, out / "spilled", rank)
    bases(out, rank)
    edits(out, rank)
    dist.barrier()
    dist.destroy_process_group()


def real(name: str, shape: torch.Size) -> Tensor:
    """Leave out the row of zeros that stands for no data."""
    return torch.full(shape, shape.numel() > 1)


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = model()
    for layer in (net.gate, net.up, net.down):
        fully_shard(layer)
    fully_shard(net)
    return net


def bases(out: Path, rank: int) -> None:
    factors = driven(model(), rank, dist.get_world_size())
    dealt = factors.eigh(group="auto")
    save(dealt, out / "dealt", rank)
    stored = factors.eigh(group="auto", directory=out / "stored")
    assert list(stored) == list(factors)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [dealt[n].vectors_a for n in dealt])
    assert all(
        torch.equal(a, b) for one in everywhere for a, b in zip(one, everywhere[0], strict=True)
    )
    broken = Factors({n: f for n, f in factors.items()})
    poisoned = broken["down"].g_sum.clone()
    if rank == dist.get_world_size() - 1:
        poisoned.fill_(float("nan"))
    layers = {**broken.layers, "down": curvfast.LayerFactors(broken["down"].a_sum, poisoned, 9, 9)}
    try:
        Factors(layers).eigh(group="auto")
    except curvfast.CurvfastError as error:
        (out / f"nan-{rank}.txt").write_text(str(error))


def edits(out: Path, rank: int) -> None:
    basis = Eigenbasis.from_pretrained(out / "stored")
    fsdp = sharded()
    report = curvfast.edit(fsdp, basis, mass=0.7)
    whole = {n: p.full_tensor() for n, p in fsdp.named_parameters()}
    before = {n: p.full_tensor().clone() for n, p in fsdp.named_parameters()}
    with curvfast.edited(fsdp, basis, fraction=0.3):
        pass
    same = all(torch.equal(p.full_tensor(), before[n]) for n, p in fsdp.named_parameters())
    # Made of whole weights, applied to sharded ones, and back.
    patch = curvfast.make_patch(model(), basis, mass=0.7)
    fsdp = sharded()
    before = {n: p.full_tensor().clone() for n, p in fsdp.named_parameters()}
    patch.apply(fsdp)
    patched = {n: p.full_tensor().clone() for n, p in fsdp.named_parameters()}
    again = curvfast.make_patch(sharded(), basis, mass=0.7)
    same &= all(again.layers[n].before == layer.before for n, layer in patch.layers.items())
    patch.revert(fsdp)
    same &= all(torch.equal(p.full_tensor(), before[n]) for n, p in fsdp.named_parameters())
    if rank == 0:
        saved = {"weights": whole, "patched": patched, "report": report.to_dict(), "same": same}
        torch.save(saved, out / "edit.pt")


def die(rank: int) -> None:
    # The launcher ends the survivors once it sees a death; here they say first what they saw.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with curvfast.collect(net := model(), LAYERS) as curvature:
        x, y = share(0, 1)[0]
        cross_entropy(net(x), y).backward()
    # Nobody dies while another is still on its way here.
    dist.barrier()
    if rank == 1:
        os._exit(3)
    try:
        curvature.factors()
    except curvfast.CurvfastError as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
        os._exit(0)


def save(value: Any, folder: Path, rank: int) -> None:
    if rank == 0:
        value.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), death="death" in sys.argv)
