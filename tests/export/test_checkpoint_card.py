"""An edited checkpoint: loads as any other, and says what was done to it."""

from __future__ import annotations

import ast
import copy
import json
import re
from typing import Any

import pytest
import torch
from cases import basis_of, gpt2, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvfast
from curvfast.editing.report import EditReport, LayerEdit
from curvfast.errors import BasisMismatch, InputError, StorageError
from curvfast.export.model_card import edit_section, with_section
from curvfast.hf.small import train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
MARKERS = ("<!-- curvfast -->", "<!-- /curvfast -->")


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def measured(request: pytest.FixtureRequest) -> tuple[nn.Module, curvfast.Eigenbasis]:
    torch.manual_seed(0)
    model = request.param()
    model.config._name_or_path = "house/model"
    return model, basis_of(model)


@pytest.fixture
def edited(measured) -> tuple[nn.Module, EditReport]:
    model = copy.deepcopy(measured[0])
    return model, curvfast.edit(model, measured[1], mass=0.7)


def section(folder: Any) -> str:
    text = (folder / "README.md").read_text()
    return text.split(MARKERS[0])[1].split(MARKERS[1])[0]


def test_it_loads_as_any_other(edited, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = edited
    tokenizer = train_tokenizer(["to be or not to be"] * 3, 300)
    curvfast.save_edited(model, report, tmp_path / "deep" / "out", tokenizer)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    again = AutoTokenizer.from_pretrained(tmp_path / "deep" / "out")
    assert again.encode("to be") == tokenizer.encode("to be")


def test_the_json_is_the_report(edited, tmp_path) -> None:
    model, report = edited
    curvfast.save_edited(model, report, tmp_path, perplexity={"edited": 44.4})
    facts = json.loads((tmp_path / "curvfast.json").read_text())
    assert facts["kind"] == "curvfast-edit"
    assert facts["format_version"] == 1
    assert facts["curvfast_version"] == curvfast.__version__
    assert facts["perplexity"] == {"edited": 44.4}
    assert EditReport.from_dict(facts) == report
    assert facts["provenance"]["factors"]["tokens"] == 243


def test_the_section_tells_layers_shares_perplexity_and_data(edited, tmp_path) -> None:
    model, report = edited
    told = {"unedited": 35.377, "edited": 44.444}
    curvfast.save_edited(model, report, tmp_path, perplexity=told)
    text = section(tmp_path)
    assert "## Edited with curvfast" in text
    for entry in report.layers:
        cells = (entry.mass, entry.fraction, entry.relative_change)
        row = " | ".join([f"`{entry.name}`", *(f"{share:.2%}" for share in cells)])
        assert f"| {row} |" in text
    assert "lives, were removed; those of\nhigh" in text
    assert f"are as they were: {report.kept_fraction:.2%} of all" in text
    assert "| unedited | 35.38 |\n| edited | 44.44 |" in text
    assert "tokens: 243" in text
    assert "labels: sampled" in text
    # Every row of a table has as many cells as its head.
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    curvfast.save_edited(model, report, tmp_path)
    assert "perplexity" not in section(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"mass": 0.7},
        {"mass": 0.7, "layers": ["*.0.*"]},
        {"fraction": 0.25, "strength": -0.3},
        {"pairs": 100, "strength": 0.1 + 0.2},
        {"fraction": 0.4, "importance": "kfac_saliency"},
    ],
)
def test_the_snippet_makes_the_edit_again(measured, options, tmp_path, monkeypatch) -> None:
    model, basis = measured
    model = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "base")
    basis.save_pretrained(tmp_path / "basis")
    report = curvfast.edit(model, basis, **options)
    curvfast.save_edited(model, report, tmp_path / "out")
    snippet = re.findall(r"```python\n(.*?)```", section(tmp_path / "out"), re.DOTALL)[0]
    assert '"house/model"' in snippet
    if "strength" in options:
        assert f"strength={options['strength']!r}," in snippet
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(snippet.replace("house/model", "base"), made)
    for name, parameter in model.named_parameters():
        assert torch.equal(made["model"].get_parameter(name), parameter), name


def test_what_is_not_known_is_not_made_up() -> None:
    entry = LayerEdit("up", 3, 0.5, float("nan"), 0.1, 1.0, 0.0)
    text = edit_section(EditReport((entry,), 6, strength=0.25))
    assert "factors of unknown origin" in text
    assert "scaled by 0.75" in text
    assert "| `up` | not known | 50.00% | 10.00% |" in text
    ast.parse(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    given_ = EditReport((entry,), 6, provenance={"rule": {"selection": "given"}})
    assert "selection=kept," in edit_section(given_)
    rule = {"importance": "ekfac", "corrections": "given"}
    text = edit_section(EditReport((entry,), 6, provenance={"rule": rule}))
    assert "importance='ekfac'," in text
    assert "corrections=corrections," in text
    assert "what the importance `ekfac` leaves out was removed" in text
    assert "what a given selection leaves out" in edit_section(given_)
    for other in ({"importance": "svd", "fraction": 0.5}, {"selection": "given"}):
        said = edit_section(EditReport((entry,), 6, provenance={"rule": other}))
        assert "of low curvature" not in said
    for same in ({"mass": 0.6}, {"mass": 0.6, "importance": "kfac"}):
        said = edit_section(EditReport((entry,), 6, provenance={"rule": same}))
        assert "directions of low curvature" in said


class TestReadme:
    @pytest.mark.parametrize(
        "text", ["", "# Title\n", "# Title", "---\ntags: [x]\n---\r\n# Überschrift\r\n\r\ntext\r\n"]
    )
    def test_what_was_there_stays_and_the_section_is_replaced(self, edited, tmp_path, text) -> None:
        model, report = edited
        if text:
            (tmp_path / "README.md").write_bytes(text.encode())
        curvfast.save_edited(model, report, tmp_path, perplexity={"first": 1.0})
        once = (tmp_path / "README.md").read_bytes().decode()
        assert once.startswith(text or MARKERS[0])
        (tmp_path / "README.md").write_bytes((once + "\nafter\n").encode())
        curvfast.save_edited(model, report, tmp_path, perplexity={"second": 2.0})
        twice = (tmp_path / "README.md").read_bytes().decode()
        assert twice == once.replace("first | 1.00", "second | 2.00") + "\nafter\n"

    @pytest.mark.parametrize(
        "text",
        [
            MARKERS[0],
            MARKERS[1],
            MARKERS[1] + MARKERS[0],
            2 * "".join(MARKERS),
            MARKERS[0] + "".join(MARKERS),
        ],
    )
    def test_markers_that_do_not_match_are_refused_before_anything_is_written(
        self, edited, tmp_path, text
    ) -> None:
        model, report = edited
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(StorageError, match="mend it"):
            curvfast.save_edited(model, report, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
        assert (tmp_path / "README.md").read_text() == text

    def test_a_card_that_is_no_text_is_refused(self, edited, tmp_path) -> None:
        model, report = edited
        (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(StorageError, match="could not write"):
            curvfast.save_edited(model, report, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["README.md"]

    @given(st.text(max_size=40), st.text(max_size=40))
    @settings(max_examples=50, deadline=None)
    def test_text_around_the_section_is_kept(self, before: str, after: str) -> None:
        text = f"{before}{MARKERS[0]}old{MARKERS[1]}{after}"
        found = with_section(text, "new\n")
        assert found == f"{before}{MARKERS[0]}\nnew\n{MARKERS[1]}{after}"
        added = with_section(before, "new\n")
        assert added.startswith(before)
        assert with_section(added, "new\n") == added


class TestWhatIsRefused:
    def refused(self, model: Any, report: Any, tmp_path: Any, error: type, match: str) -> None:
        with pytest.raises(error, match=match):
            curvfast.save_edited(model, report, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_models_that_would_not_save_whole(self, edited, tmp_path) -> None:
        model, report = edited
        self.refused(nn.Linear(2, 3), report, tmp_path, InputError, "make_patch")

        class Wrapped(nn.Module):
            def get_base_model(self) -> nn.Module:
                return model

        self.refused(Wrapped(), report, tmp_path, InputError, "merge_and_unload")

    def test_a_report_of_another_model(self, edited, tmp_path) -> None:
        _, report = edited
        other = llama(num_hidden_layers=1)
        self.refused(other, report, tmp_path, BasisMismatch, "which this LlamaForCausalLM lacks")

    def test_a_file_in_the_folders_place(self, edited, tmp_path) -> None:
        model, report = edited
        (tmp_path / "out").write_text("")
        with pytest.raises(StorageError, match="out"):
            curvfast.save_edited(model, report, tmp_path / "out")
        assert (tmp_path / "out").read_text() == ""


def test_wrappers_are_looked_into(edited, tmp_path) -> None:
    model, report = edited
    curvfast.save_edited(torch.nn.DataParallel(model), report, tmp_path)
    assert type(model).from_pretrained(tmp_path) is not None
