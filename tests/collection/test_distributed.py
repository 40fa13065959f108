"""Many processes: any number of ranks and any shards give the factors of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import batches, corrected, driven, looped, model
from torch import nn

import curvfast
from curvfast import Corrections, Eigenbasis, Factors
from curvfast.collection.factor_sums import _refined
from curvfast.distributed import deal, group_of
from curvfast.errors import DistributedError, InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*rank-deficient", "ignore:.*negative eigenvalues")
SCRIPT = Path(__file__).parent / "ranks.py"


def launch(ranks: int, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks), str(SCRIPT), str(out), *more,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session", params=[1, 2, 3, 4], ids="{}-ranks".format)
def results(request: Any, tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("ranks")
    done = launch(request.param, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def assert_close(found: Factors, expected: Factors) -> None:
    assert list(found) == list(expected)
    for name in found:
        one, two = found[name], expected[name]
        assert (one.rows_a, one.rows_g) == (two.rows_a, two.rows_g)
        for a, b in ((one.a_sum, two.a_sum), (one.g_sum, two.g_sum)):
            assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize(
    "kind", ["driven", "driven-ddp", "looped-ddp", "driven-fsdp", "looped-fsdp", "until", "spilled"]
)
def test_ranks_give_the_factors_of_one_process(results: Path, kind: str) -> None:
    found = Factors.from_pretrained(results / kind)
    assert_close(found, driven(model(), 0, 1))
    assert found["gate"].a_sum is found["up"].a_sum
    if kind == "until":
        assert found.provenance["convergence"]
    assert found.provenance["tokens" if "driven" in kind else "labels"]


def test_ranks_give_the_weighted_moments_of_one_process(results: Path) -> None:
    found = Factors.from_pretrained(results / "marginals")
    expected = driven(model(), 0, 1, marginals=True)
    assert_close(found, expected)
    for name in expected:
        for side in ("a_weighted", "g_weighted"):
            one, two = getattr(found[name], side), getattr(expected[name], side)
            assert (one - two).norm() <= 1e-6 * two.norm()


@pytest.mark.parametrize("per", ["position", "sequence"])
def test_ranks_give_the_corrections_of_one_process(results: Path, per: str) -> None:
    found = Corrections.from_pretrained(results / per)
    expected = corrected(model(), 0, 1, per=per)
    assert list(found) == list(expected)
    for name in expected:
        assert found.layers[name].count == expected.layers[name].count
        assert found.layers[name].count == (59 if per == "position" else 11)
        assert (found[name] - expected[name]).norm() <= 1e-6 * expected[name].norm()


def test_a_loop_is_what_collect_from_is() -> None:
    assert_close(looped(model(), 0, 1, accumulate=False), driven(model(), 0, 1))


def test_dealt_decompositions_are_those_of_one_process(results: Path) -> None:
    expected = Factors.from_pretrained(results / "driven").eigh()
    for folder in ("dealt", "stored"):
        found = Eigenbasis.from_pretrained(results / folder)
        for name in expected:
            torch.testing.assert_close(found[name].values_g, expected[name].values_g)
            torch.testing.assert_close(
                found[name].vectors_a, expected[name].vectors_a, rtol=0, atol=1e-5
            )
        assert found["gate"].vectors_a is found["up"].vectors_a


def test_a_rank_that_cannot_decompose_stops_all(results: Path) -> None:
    messages = [path.read_text() for path in sorted(results.glob("nan-*.txt"))]
    owned = [message for message in messages if "NaN" in message]
    assert owned in ([], messages)


def test_sharded_weights_are_edited_as_whole_ones(results: Path) -> None:
    saved = torch.load(results / "edit.pt", weights_only=False)
    net = model()
    report = curvfast.edit(net, Eigenbasis.from_pretrained(results / "stored"), mass=0.7)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(saved["weights"][name], parameter.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(saved["patched"][name], parameter.detach(), rtol=0, atol=1e-6)
    assert saved["report"]["kept_fraction"] == report.kept_fraction
    assert saved["same"]


def test_a_rank_that_dies_is_an_error_for_the_others(tmp_path: Path) -> None:
    done = launch(2, tmp_path, "death")
    assert done.returncode != 0
    assert "rank 0: DistributedError: this rank could not" in done.stdout
    assert "another rank died" in done.stdout


@pytest.mark.parametrize(("said", "shown"), [("", "RuntimeError"), ("gone\n#0 a frame", "gone")])
def test_an_error_of_the_exchange_is_told_whatever_it_says(said: str, shown: str) -> None:
    with (
        pytest.raises(DistributedError, match=rf"with the others: {shown}\. The likely cause"),
        curvfast.distributed._explained("meet"),
    ):
        raise RuntimeError(said)


@given(
    st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 99), max_size=12),
    st.integers(1, 5),
)
def test_jobs_are_dealt_within_four_thirds_of_the_best(jobs: dict[str, int], ranks: int) -> None:
    owners = deal({key: float(cost) for key, cost in jobs.items()}, ranks)
    assert set(owners) == set(jobs)
    load = [sum(jobs[k] for k in jobs if owners[k] == rank) for rank in range(ranks)]
    lowest = max([sum(jobs.values()) / ranks, *jobs.values()]) if jobs else 0
    # Graham's bound is against the optimum; where jobs outnumber ranks two may have to share.
    largest = sorted(jobs.values(), reverse=True)[ranks - 1 : ranks + 1]
    best = max(lowest, sum(largest) if len(largest) == 2 else 0)
    assert max(load) <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9


def test_sharing_is_what_all_ranks_share() -> None:
    assert _refined([[("a", "b", "c")], [("a", "b"), ("c",)]]) == [["a", "b"], ["c"]]
    assert _refined([[("a", "b")], []]) == [["a", "b"]]
    assert _refined([[("a",)], [("a", "b")]]) == [["a"], ["b"]]
    assert _refined([[], []]) == []


def test_groups_are_checked_and_one_process_needs_none() -> None:
    assert group_of("auto") is None
    assert group_of(None) is None
    with pytest.raises(InputError, match="group="):
        group_of("everyone")


def test_tensor_parallel_weights_are_refused_by_name() -> None:
    class Parallel:
        """Stands for a DTensor of tensor parallelism."""

        def __init__(self, dim: int, name: str) -> None:
            from torch.distributed.tensor import Shard

            self.placements, self.full_tensor = (Shard(dim),), None
            self.device_mesh = type("Mesh", (), {"mesh_dim_names": (name,)})()

    refuse = curvfast.distributed.refuse_layout
    for layout in ((1, "tp"), (0, "tp"), (1, "dp")):
        with pytest.raises(InputError, match=r"layer 'x' is laid out .* tensor parallelism is not"):
            refuse("layer 'x'", Parallel(*layout))
    refuse("layer 'x'", Parallel(0, "dp"))
    with pytest.raises(InputError, match="one expert's slice"):
        refuse("layer 'x'", Parallel(0, "dp"), sliced=True)


def test_without_torch_distributed_nothing_is_loaded_or_sent() -> None:
    net = nn.Sequential(nn.Linear(7, 4))
    found = curvfast.collect_from(net, [x for x, _ in batches()], "*", progress=False)
    assert found.provenance["ranks"] == 1
