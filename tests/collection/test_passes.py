"""Collections that fit, stop and restart: what is cut, moved, halved or killed changes no sum."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import llama, token_batches
from torch import nn

import curvfast
from curvfast import Converged, Factors
from curvfast.collection.checkpoint import Checkpoint
from curvfast.errors import FormatError, InputError, NumericalWarning, StorageError

pytestmark = pytest.mark.filterwarnings("ignore:.*rank-deficient")

SIZES = (9, 10, 11, 12, 13, 8, 7)


def data() -> list[dict[str, Any]]:
    return token_batches(sizes=SIZES)


def run(model: nn.Module, batches: Any, **options: Any) -> Factors:
    return curvfast.collect_from(model, batches, progress=False, **options)


def assert_same(one: Factors, two: Factors) -> None:
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name].a_sum, two[name].a_sum)
        assert torch.equal(one[name].g_sum, two[name].g_sum)
        assert (one[name].rows_a, one[name].rows_g) == (two[name].rows_a, two[name].rows_g)


@pytest.mark.cpu_branches
def test_factors_are_freed_when_they_are_let_go() -> None:
    factors = run(llama(), data())
    watched = weakref.ref(next(iter(factors.values())).g_sum)
    gc.disable()
    try:
        del factors
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [1, 4, 100])
def test_passes_over_some_layers_are_one_over_all(size: int) -> None:
    model, batches = llama(), data()
    assert_same(run(model, batches, layers_per_pass=size), run(model, batches))


def test_a_generator_cannot_be_passed_over_twice() -> None:
    with pytest.raises(InputError, match="read again"):
        run(llama(), iter(data()), layers_per_pass=2)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_sums_may_live_elsewhere(place: str) -> None:
    model, batches = llama(), data()
    assert_same(run(model, batches, sums_device=place), run(model, batches))


def test_sums_on_disk_are_in_files_that_leave_nothing_behind(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with curvfast.collect(llama(), sums_device="disk") as curvature:
        model = curvature._model
        model(**data()[0]).loss.backward()
        maps = Path("/proc/self/maps").read_text()
        assert f"{tmp_path}/curvfast-sums-" in maps
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("until", [None, Converged(shared_mass=0.999, first=2)])
def test_a_run_cut_anywhere_goes_on_to_the_same_factors(tmp_path: Path, until: Any) -> None:
    model, batches = llama(), data()
    expected = run(model, batches, until=until)
    for cut in range(1, len(batches)):
        folder = tmp_path / str(cut)
        with pytest.raises(KeyError):
            run(model, _failing(batches, cut), checkpoint=folder, every=1, until=until)
        got = run(model, batches, checkpoint=folder, every=1, until=until)
        assert_same(got, expected)
        assert got.provenance["tokens"] == expected.provenance["tokens"]
        assert got.provenance.get("convergence") == expected.provenance.get("convergence")


def test_thinned_rows_are_drawn_the_same_after_a_restart(tmp_path: Path) -> None:
    model, batches = llama(), data()
    options: dict[str, Any] = {"rows_per_step": 0.5, "layers_per_pass": 5}
    expected = run(model, batches, **options)
    with pytest.raises(KeyError):
        run(model, _FailingList(batches, 4), checkpoint=tmp_path, every=2, **options)
    assert_same(run(model, batches, checkpoint=tmp_path, every=2, **options), expected)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    model, batches = llama(), data()
    first = run(model, batches, checkpoint=tmp_path, tokens=60)
    assert_same(run(model, _failing(batches, 0), checkpoint=tmp_path, tokens=60), first)


def test_a_stream_that_knows_its_place_is_not_read_again(tmp_path: Path) -> None:
    model = llama()
    expected = run(model, Stream())
    broken = Stream(stop=3)
    with pytest.raises(KeyError):
        run(model, broken, checkpoint=tmp_path, every=1)
    again = Stream()
    assert_same(run(model, again, checkpoint=tmp_path, every=1), expected)
    assert again.read == list(range(3, len(SIZES)))


class Stream:
    """Batches with a position that can be saved."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.at, self.read = stop, 0, []

    def __iter__(self) -> Any:
        torch.manual_seed(7)
        batches = data()
        while self.at < len(batches):
            if self.at == self.stop:
                raise KeyError("the data ends here")
            self.read.append(self.at)
            self.at += 1
            yield batches[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class _FailingList(list):  # type: ignore[type-arg]
    def __init__(self, batches: list[Any], cut: int) -> None:
        super().__init__(batches)
        self.cut = cut

    def __iter__(self) -> Any:
        return _failing(list(self[:]), self.cut)


def _failing(batches: list[Any], cut: int) -> Any:
    yield from batches[:cut]
    raise KeyError("the data ends here")


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, nn.Module, list[Any]]:
    model, batches = llama(), data()
    with pytest.raises(KeyError):
        run(model, _failing(batches, 5), checkpoint=tmp_path / "state", every=1)
    return tmp_path / "state", model, batches


@pytest.mark.parametrize(
    ("change", "what"),
    [({"seed": 1}, "seed"), ({"tokens": 90}, "tokens"), ({"layers": "attention"}, "layers")],
)
def test_another_collections_checkpoint_is_refused(stopped: Any, change: Any, what: str) -> None:
    folder, model, batches = stopped
    with pytest.raises(StorageError, match=f"another collection(.|\n)*{what}"):
        run(model, batches, checkpoint=folder, **change)


def test_another_models_checkpoint_is_refused(stopped: Any) -> None:
    folder, _, batches = stopped
    with pytest.raises(StorageError, match="weights"):
        run(llama(), batches, checkpoint=folder)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "pass-0"
    inside.mkdir()
    (inside / "thesis.tex").write_text("years of work")
    with pytest.raises(FormatError, match="not empty"):
        run(llama(), data(), checkpoint=tmp_path)
    assert (inside / "thesis.tex").read_text() == "years of work"


def test_a_newer_format_is_refused(stopped: Any) -> None:
    folder, model, batches = stopped
    config = folder / "pass-0" / "slot-1" / "config.json"
    config.write_text(config.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(FormatError, match="upgrade curvfast"):
        run(model, batches, checkpoint=folder)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_the_last_whole_state_is_used(stopped: Any, damage: str) -> None:
    folder, model, batches = stopped
    newest = max((folder / "pass-0").glob("slot-*/tensors-*"), key=lambda p: p.stat().st_mtime_ns)
    if damage == "missing":
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.warns(NumericalWarning, match="going on from the other"):
        got = run(model, batches, checkpoint=folder)
    assert_same(got, run(model, batches))


def test_no_whole_state_is_said(stopped: Any) -> None:
    folder, model, batches = stopped
    for path in (folder / "pass-0").glob("slot-*/tensors-*"):
        path.write_bytes(b"")
    with pytest.raises(StorageError, match="no whole checkpoint is left"):
        run(model, batches, checkpoint=folder)


@pytest.mark.parametrize("place", range(50))
def test_a_flipped_byte_never_loads_silently(stopped: Any, place: int) -> None:
    folder = stopped[0]
    files = sorted(path for path in (folder / "pass-0").rglob("*") if path.is_file())
    generator = torch.Generator().manual_seed(place)
    path = files[int(torch.randint(len(files), (), generator=generator))]
    held = bytearray(path.read_bytes())
    at = int(torch.randint(len(held), (), generator=generator))
    held[at] ^= 1 << int(torch.randint(8, (), generator=generator))
    path.write_bytes(held)
    state = Checkpoint(folder / "pass-0", {})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loaded = state.load()
        except StorageError:
            return
    assert [warning.category for warning in said] == [NumericalWarning]
    assert loaded is not None
    assert loaded[0]["batches"] in (4, 5)


def test_a_full_disk_loses_nothing(stopped: Any, monkeypatch: Any) -> None:
    folder, model, batches = stopped
    original = os.replace

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="free space"):
        run(model, batches, checkpoint=folder, every=1)
    monkeypatch.setattr(os, "replace", original)
    assert_same(run(model, batches, checkpoint=folder), run(model, batches))


CHILD = """
import sys, torch
import curvfast
from torch import nn
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 5))
batches = [torch.randn(4 + i % 7, 9) for i in range(150)]
print("ready", flush=True)
factors = curvfast.collect_from(
    model, batches, "*", progress=False, checkpoint=sys.argv[1], every=1, rows_per_step=0.7
)
factors.save_pretrained(sys.argv[2])
"""


@pytest.mark.cpu_branches
def test_killed_at_any_moment_it_goes_on_to_the_same_factors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(11)
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    _child(script, tmp_path / "one", straight).wait()
    kills = 0
    while not (killed / "config.json").exists():
        child = _child(script, tmp_path / "two", killed)
        if kills < 10:
            try:
                child.wait(0.02 + 0.1 * float(torch.rand((), generator=generator)))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                kills += 1
        assert child.wait() in (0, -signal.SIGKILL)
    assert kills == 10
    assert_same(Factors.from_pretrained(killed), Factors.from_pretrained(straight))


def _child(script: Path, state: Path, out: Path) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, script, state, out], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_the_two_newest_states_are_kept(tmp_path: Path) -> None:
    for count in range(1, 5):
        state = Checkpoint(tmp_path, {"seed": 0})
        before = state.load()
        assert (before[0]["batches"] if before else 0) == count - 1
        state.save({"batches": count}, {"x": torch.full((3,), float(count))})
        slots = [json.loads(p.read_text())["state"] for p in tmp_path.glob("slot-*/config.json")]
        assert {slot["batches"] for slot in slots} == {count, max(1, count - 1)}


@pytest.mark.parametrize(("every", "states"), [(1, 7), (3, 3), (7, 1), (50, 1)])
def test_each_state_is_written_once(
    tmp_path: Path, monkeypatch: Any, every: int, states: int
) -> None:
    written: list[int] = []
    original = Checkpoint.save

    def save(checkpoint: Checkpoint, facts: Any, tensors: Any) -> None:
        written.append(facts["batches"])
        original(checkpoint, facts, tensors)

    monkeypatch.setattr(Checkpoint, "save", save)
    model, batches = llama(), data()
    first = run(model, batches, checkpoint=tmp_path, every=every)
    assert written == sorted(set(written))
    assert (len(written), written[-1]) == (states, 7)
    assert_same(run(model, batches, checkpoint=tmp_path, every=every), first)
    assert len(written) == states
