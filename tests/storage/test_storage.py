"""Files: whole or untouched, never silently wrong."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from curvfast import storage
from curvfast.errors import StorageError


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, 1.0)
    return tmp_path


def save(path, value: float) -> None:
    storage.write_folder(
        path, kind="test", meta={"note": {"rows": 12}}, tensors={"x": torch.full((4, 5), value)}
    )


def load(path):
    return storage.read_folder(path, kind="test")


def test_round_trip(folder) -> None:
    meta, tensors = load(folder)
    assert meta == {"note": {"rows": 12}}
    assert torch.equal(tensors["x"], torch.ones(4, 5))


def test_an_overwrite_leaves_one_tensor_file(folder) -> None:
    save(folder, 2.0)
    assert load(folder)[1]["x"][0, 0] == 2
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("stage", ["tensors", "config"])
def test_a_failed_write_keeps_the_old_state(folder, monkeypatch, stage: str) -> None:
    original = os.replace

    def full(source, target):
        if (stage == "config") == str(target).endswith("config.json"):
            raise OSError(28, "No space left on device")
        return original(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="free space"):
        save(folder, 2.0)
    monkeypatch.undo()
    assert load(folder)[1]["x"][0, 0] == 1
    assert not list(folder.glob(".partial-*"))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensors_that_do_not_fit_are_told_as_any_failure(folder) -> None:
    large = {"x": torch.zeros(2**16)}
    with files_of_at_most(2**17):
        with pytest.raises(StorageError, match="free space"):
            storage.write_folder(folder, kind="test", meta={}, tensors=large)
        with pytest.raises(OSError, match="too large"):
            storage.write_tensors(folder / "alone.safetensors", large)
    assert load(folder)[1]["x"][0, 0] == 1
    assert len(list(folder.iterdir())) == 2


def test_tensors_that_share_memory_are_each_written(tmp_path) -> None:
    x = torch.arange(6.0)
    given = {"x": x, "again": x, "part": x[2:4], "turned": x.view(2, 3).T}
    storage.write_folder(tmp_path, kind="test", meta={}, tensors=given)
    _, found = load(tmp_path)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_a_flipped_byte_anywhere_is_noticed(folder, place: int) -> None:
    for path in sorted(folder.iterdir()):
        content = bytearray(path.read_bytes())
        at = place * len(content) // 100
        content[at] ^= 1
        path.write_bytes(content)
        with pytest.raises(StorageError):
            load(folder)
        content[at] ^= 1
        path.write_bytes(content)
    load(folder)


def test_a_truncated_or_missing_file_is_noticed(folder) -> None:
    path = next(folder.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(StorageError, match="damaged"):
        load(folder)
    path.unlink()
    with pytest.raises(StorageError, match="missing"):
        load(folder)


def test_other_kinds_and_newer_formats_are_refused(folder) -> None:
    with pytest.raises(StorageError, match="holds test, not other"):
        storage.read_folder(folder, kind="other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(StorageError, match="upgrade"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(StorageError, match="something else"):
        load(folder)


def test_no_folder_is_an_error(tmp_path) -> None:
    with pytest.raises(StorageError, match="not a folder"):
        load(tmp_path / "nothing")


def test_json_is_replaced_whole(tmp_path) -> None:
    path = tmp_path / "deep" / "results.json"
    storage.write_json(path, {"ρ": 0.6})
    with pytest.raises(TypeError):
        storage.write_json(path, {"bad": object()})
    assert json.loads(path.read_text()) == {"ρ": 0.6}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
