"""The benchmark against peers: what it measures with, and a run of it with no peer at all."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import measure
import peers
import pytest
import table
import torch
from peers import run, worker
from peers.cases import CASES
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: Any) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("peers") / "peers.json"
    assert run.main(["--smoke", "--rounds", "2", "--out", str(out)]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_a_run_without_peers_measures_everything(smoke: dict[str, Any]) -> None:
    assert smoke["schema_version"] == run.SCHEMA
    assert smoke["absent"] == peers.ABSENT
    assert {"cpu", "capability", "threads", "torch", "commit"} <= set(smoke["environment"])
    ours, official = smoke["cases"]["smoke"]["rows"]
    assert (ours["peer"], official["peer"]) == ("ours", "official")
    for row in (ours, official):
        assert row["status"] == "ok"
        assert 0 < row["error_a"] < run.TOLERANCE
        assert 0 < row["error_g"] < run.TOLERANCE
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert row["convention"]
        assert row["positions"]
    assert ours["flop_per_batch"] < official["flop_per_batch"]


def test_counts_are_those_of_a_batch(smoke: dict[str, Any]) -> None:
    """The official collector has no products but the model's, whole, and the factors'."""
    case = CASES["smoke"]
    model, batch = case.model(), case.data(1)[0]

    def step() -> None:
        logits = model(**batch, use_cache=False).logits[:, :-1]
        logits.sum().backward()

    rows = case.sequences * (case.length - 1)
    widths = [d for n in case.names(model) for d in model.get_submodule(n).weight.shape]
    expected = measure.products(step) + sum(2 * rows * d * d for d in widths)
    assert smoke["cases"]["smoke"]["rows"][1]["flop_per_batch"] == expected


def test_its_table_has_a_line_for_each_peer(smoke: dict[str, Any]) -> None:
    failed = {"peer": "x", "status": "failed", "version": "1", "failed": "ValueError: no"}
    wrong = {"peer": "y", "status": "wrong", "version": "2", "error_a": 0.5, "error_g": math.nan}
    lines = run.table([*smoke["cases"]["smoke"]["rows"], failed, wrong]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[4].strip() for line in lines[2:3]] == ["1.00"]
    assert "failed: ValueError: no" in lines[4]
    assert "5.0e-01" in lines[5]


def test_a_failing_peer_says_why_and_is_asked_no_more() -> None:
    assert worker.answered(lambda: {"x": 1 // 0})["failed"].startswith("ZeroDivisionError: ")
    assert run.verdict({"peer": "x", "failed": "ValueError: no"}, CASES["smoke"]) == "failed"


@pytest.mark.parametrize("error", [2e-5, math.nan, math.inf])
def test_a_wrong_peer_is_told_from_a_right_one(error: float) -> None:
    case = CASES["smoke"]
    assert run.verdict({"peer": "x", "error_a": 1e-6, "error_g": 1e-6}, case) == "ok"
    for wrong in ({"error_a": error, "error_g": 1e-6}, {"error_a": 1e-6, "error_g": error}):
        assert run.verdict({"peer": "x", **wrong}, case) == "wrong"
        with pytest.raises(RuntimeError, match="ours is wrong"):
            run.verdict({"peer": "ours", **wrong}, case)


def test_sampled_labels_are_the_models_own(smoke: dict[str, Any]) -> None:
    """A draw changes G little and A not at all."""
    case = CASES["smoke-sampled"]
    for row in smoke["cases"]["smoke-sampled"]["rows"]:
        assert row["status"] == "ok"
        assert 0 < row["error_a"] < run.TOLERANCE
        assert 0 < row["error_g"] < run.DRAW_TOLERANCE
    assert run.verdict({"peer": "x", "error_a": 1e-6, "error_g": 0.04}, case) == "ok"
    assert run.verdict({"peer": "x", "error_a": 2e-5, "error_g": 0.04}, case) == "wrong"
    assert run.verdict({"peer": "x", "error_a": 1e-6, "error_g": 0.06}, case) == "wrong"


def test_every_peer_said_to_sample_does() -> None:
    folder = ROOT / "benchmarks" / "peers"
    sampling = {
        name for name in peers.PEERS if "def prepare_sampled" in (folder / f"{name}.py").read_text()
    }
    assert sampling == set(peers.SAMPLING)


def test_an_error_of_traces_is_the_worst_layers() -> None:
    eye = torch.eye(2)
    truth = {"x": eye, "y": 3 * eye}
    assert measure.worst_trace_error(truth, truth) == 0
    assert measure.worst_trace_error({"x": eye, "y": 1.5 * eye}, truth) == pytest.approx(0.5)
    assert math.isnan(measure.worst_trace_error({"x": math.nan * eye, "y": 3 * eye}, truth))


def test_errors_are_the_worst_layers_and_a_nan_is_one() -> None:
    eye = torch.eye(2)
    truth = {"x": (eye, eye), "y": (eye, eye)}
    assert measure.worst_errors(truth, truth) == (0, 0)
    assert measure.worst_errors({**truth, "x": (1.5 * eye, eye)}, truth) == pytest.approx((0.5, 0))
    for name in truth:
        found = measure.worst_errors({**truth, name: (eye, math.nan * eye)}, truth)
        assert math.isnan(found[1])
    with pytest.raises(ValueError, match="'y'"):
        measure.worst_errors({"x": truth["x"]}, truth)


def test_products_count_those_added_in_place_and_attention() -> None:
    a, b, out = torch.randn(3, 5), torch.randn(5, 7), torch.zeros(3, 7)
    assert measure.products(lambda: out.addmm_(a, b)) == 2 * 3 * 5 * 7
    q = torch.randn(1, 2, 8, 4, requires_grad=True)

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(q, q, q, is_causal=True)

    forward = 2 * (2 * 2 * 8 * 8 * 4)
    assert measure.products(attend) == forward
    # Scores once more, and two products each for what the scores and the output came from.
    assert measure.products(lambda: attend().sum().backward()) == forward * (1 + 5 / 2)


def test_traffic_is_what_is_read_and_written_and_views_are_free() -> None:
    x, y = torch.ones(4, 6), torch.ones(6)
    assert measure.traffic(lambda: x.T[1:].unsqueeze(0)) == (0, 0)
    assert measure.traffic(lambda: x + y) == (4 * (24 + 6 + 24), 1)
    assert measure.traffic(lambda: x.add_(y)) == (4 * (24 + 6 + 24), 1)
    assert measure.traffic(lambda: x @ x.T) == (4 * (24 + 24 + 16), 1)


def test_memory_is_what_was_alive_at_once() -> None:
    def run_twice() -> None:
        for _ in range(2):
            torch.ones(1 << 20).add(1)

    assert measure.live_bytes(run_twice) == pytest.approx(2 * 4 << 20, rel=0.01)
    # An earlier peak is none of a later run's.
    for size in (1 << 26, 1 << 25):
        grown = measure.resident_peak(lambda size=size: torch.ones(size))
        assert grown == pytest.approx(4 * size, rel=0.1)


def test_every_peer_is_pinned_and_has_a_module() -> None:
    folder = ROOT / "benchmarks" / "peers"
    pinned = set(re.findall(r"^(\S+)==", (folder / "requirements.txt").read_text(), re.MULTILINE))
    for name in peers.PEERS:
        (package,) = re.findall(r"^PACKAGE = (.+)$", (folder / f"{name}.py").read_text(), re.M)
        assert package in ("None", '"curvfast"') or package.strip('"') in pinned
    others = {path.stem for path in folder.glob("*.py")} - {"__init__", "run", "worker", "cases"}
    assert others == set(peers.PEERS)


def test_figures_of_a_cpu_are_not_taken_for_a_gpus(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "peers.json").write_text("{}")
    monkeypatch.setattr(table, "DEMO", tmp_path / "demo")
    assert table.newest_gpu() is None
