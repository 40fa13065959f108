"""How rows and unit are known: carried with every result, never mixed with what may be wrong."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import curvfast
from curvfast import distributed
from curvfast.errors import CoverageError, InputError, NumericalWarning
from curvfast.kfac.corrections import Corrections, LayerCorrection
from curvfast.kfac.evidence import KEY, Evidence, agreed, evidence_of, merged
from curvfast.kfac.factors import Factors
from curvfast.kfac.known import CONVENTION, PROVEN, TOLD, Known
from curvfast.kfac.layer_factors import LayerFactors

SAVED = Path(__file__).parents[1] / "saved"
NOT_LAST = "real positions but the last of each sequence"
UNIT = Known("1/s of a mean cross-entropy", "logits' gradient", PROVEN)


def rows(how: str = PROVEN, rule: str = NOT_LAST, by: str = "logits' gradient") -> Known:
    return Known(rule, by, how)


def evidence(unit: Known = UNIT, **layers: Known) -> Evidence:
    return Evidence(unit, layers or {"up": rows(), "down": rows()})


def factors(known: Evidence | None = None, **facts: Any) -> Factors:
    x = torch.randn(40, 4)
    layer = LayerFactors(x.T @ x, x.T @ x, 40, 40)
    provenance = facts if known is None else {**facts, KEY: known.to_dict()}
    return Factors({"up": layer, "down": layer}, provenance)


def corrections(known: Evidence) -> Corrections:
    layer = LayerCorrection(torch.ones(4, 4), 3)
    return Corrections({"up": layer, "down": layer}, "position", {KEY: known.to_dict()})


def mixed(kind: str, one: Evidence, two: Evidence) -> Any:
    """Return both together: a sum of factors, of corrections, or a basis with a task."""
    if kind == "factors":
        return factors(one) + factors(two)
    if kind == "corrections":
        return corrections(one) + corrections(two)
    return factors(one).eigh().with_task(factors(two))


KINDS = ("factors", "corrections", "task")


# --- carried --------------------------------------------------------------------------------------


def test_known_rows_and_unit_are_read_from_a_result_and_its_files(tmp_path: Path) -> None:
    known = evidence(up=rows(), down=replace(rows(TOLD), left_out=0.2))
    found = factors(known)
    found.save_pretrained(tmp_path / "factors")
    basis = found.eigh(directory=tmp_path / "basis")
    corrections(known).save_pretrained(tmp_path / "corrections")
    for result in (
        found, basis, basis.restricted(["up", "down"]),
        Factors.from_pretrained(tmp_path / "factors"),
        curvfast.Eigenbasis.from_pretrained(tmp_path / "basis"),
        Corrections.from_pretrained(tmp_path / "corrections"),
    ):  # fmt: skip
        assert result.known == known


def test_what_was_saved_before_is_a_convention() -> None:
    saved = (
        curvfast.Factors.from_pretrained(SAVED / "factors"),
        curvfast.Eigenbasis.from_pretrained(SAVED / "basis"),
    )
    for found in saved:
        assert found.known.rows.keys() == found.keys()
        assert {known.how for known in found.known.rows.values()} == {CONVENTION}
        assert found.known.unit is not None
        assert found.known.unit.how == CONVENTION
    assert "skip_last=False" in found.known.rows["0"].rule
    again = saved[0] + saved[0]
    assert again.known.rows["0"].how == CONVENTION


# --- what may be mixed ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_proven_and_told_by_one_rule_are_told(kind: str) -> None:
    told = evidence(replace(UNIT, how=TOLD, by="loss_scale=0.25"), up=rows(TOLD), down=rows())
    found = mixed(kind, evidence(), told).known
    assert [found.rows[name].how for name in ("up", "down")] == [TOLD, PROVEN]
    assert found.unit.how == TOLD
    assert found.unit.by == "logits' gradient; loss_scale=0.25"
    # As often as one likes: what was said already is not said again.
    assert mixed(kind, found, told).known == found


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_rules_are_not_mixed(kind: str) -> None:
    other = evidence(up=rows(), down=rows(TOLD, "every position", "skip_last=False"))
    with pytest.raises(InputError, match="same options") as caught:
        mixed(kind, evidence(), other)
    for part in ("'down'", NOT_LAST, "every position", "proven: logits", "told: skip_last=False"):
        assert part in str(caught.value)
    assert "'up'" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sure", [PROVEN, TOLD])
@pytest.mark.parametrize("what", ["rows", "unit"])
@pytest.mark.parametrize("older_first", [True, False])
def test_a_convention_is_not_mixed_with_what_is_sure(
    kind: str, sure: str, what: str, older_first: bool
) -> None:
    newer = evidence(replace(UNIT, how=sure), up=rows(sure), down=rows(sure))
    if what == "rows":
        older = replace(newer, rows={**newer.rows, "down": rows(CONVENTION)})
    else:
        older = replace(newer, unit=replace(UNIT, how=CONVENTION))
    pair = (older, newer) if older_first else (newer, older)
    with pytest.raises(InputError, match="anew") as caught:
        mixed(kind, *pair)
    assert ("layer 'down'" if what == "rows" else "the unit of G") in str(caught.value)
    names = ("the basis", "the task") if kind == "task" else ("the first", "the second")
    assert f"Measure {names[not older_first]} anew" in str(caught.value)


def test_conventions_are_mixed_as_before_unless_their_rules_are_recorded_to_differ() -> None:
    assert (factors() + factors()).known.rows["up"].how == CONVENTION
    causal, other = ({"collect": {"skip_last": last}} for last in (True, False))
    merged_before = {"merged": [causal, causal]}
    assert len(factors(**causal) + factors(**merged_before)) == 2
    with pytest.raises(InputError, match="skip_last=True"):
        factors(**causal) + factors(**other)


def test_layers_that_one_side_lacks_have_nothing_to_disagree_on() -> None:
    one = evidence(up=rows())
    found = merged(one, Evidence(None, {"down": rows(TOLD, "every position")}))
    assert found.unit == one.unit
    assert [found.rows[name].how for name in ("up", "down")] == [PROVEN, TOLD]


def test_the_larger_share_left_out_is_kept() -> None:
    one, two = (evidence(up=replace(rows(), left_out=share)) for share in (0.2, 0.1))
    assert merged(one, two).rows["up"].left_out == 0.2


def test_a_task_that_carries_nothing_is_a_convention() -> None:
    task = factors(evidence())
    with pytest.raises(InputError, match="Measure the task anew"):
        task.eigh().with_task(dict(task))
    assert len(factors().eigh().with_task(dict(task)).tasks) == 1


# --- over ranks -----------------------------------------------------------------------------------


def together(monkeypatch: pytest.MonkeyPatch, facts: list[Any], rank: int) -> Evidence:
    """Return what one of several ranks finds, whose gathered ``facts`` are given."""
    own, error = facts[rank]
    everyone = [(each.to_dict(), failed and str(failed)) for each, failed in facts]

    def gather(value: Any, group: Any) -> list[Any]:
        assert value == everyone[rank]
        return everyone

    monkeypatch.setattr(distributed, "gather", gather)
    return agreed(own, SimpleNamespace(), error)


def test_ranks_agree_on_the_weakest_and_a_rank_without_batches_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = evidence(up=rows(TOLD), down=rows())
    facts = [(evidence(), None), (Evidence(), None), (told, None)]
    found = [together(monkeypatch, facts, rank) for rank in range(3)]
    assert found[0].rows["up"].how == TOLD
    assert found[0] == found[1] == found[2]


def test_every_rank_refuses_where_one_differs_or_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = evidence(up=rows(TOLD, "every position"), down=rows())
    for rank in range(2):
        with pytest.raises(InputError, match=r"in the ranks before it, .* in rank 1"):
            together(monkeypatch, [(evidence(), None), (other, None)], rank)
    failed = CoverageError("a leak")
    for rank, kind in enumerate((InputError, CoverageError)):
        with pytest.raises(kind, match="a leak"):
            together(monkeypatch, [(evidence(), None), (evidence(), failed)], rank)


def test_one_process_alone_agrees_with_itself() -> None:
    assert agreed(evidence(), None) == evidence()
    with pytest.raises(CoverageError):
        agreed(evidence(), None, CoverageError("a leak"))


# --- shown ----------------------------------------------------------------------------------------


def test_results_are_shown_in_a_line_without_numbers_or_provenance() -> None:
    layer = factors()["up"]
    many = Factors({f"layers.{i}.up": layer for i in range(200)}, {"collect": {"seed": 12345}})
    basis = many.eigh()
    shown = [repr(each) for each in (many, basis, basis.keep(mass=0.5), corrections(evidence()))]
    assert shown[0].startswith("<Factors of 200 layers: 'layers.0.up', 'layers.1.up'")
    for text in shown:
        assert len(text) < 120
        assert "tensor" not in text
        assert "12345" not in text


def spectrum(*values: float) -> Factors:
    matrix = torch.diag(torch.tensor(values))
    return Factors({"up": LayerFactors(matrix, matrix.clone(), 1, 1)})


def test_negative_eigenvalues_within_the_resolution_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectrum(1.0, 0.5, -3e-8).eigh()
        spectrum(1.0, 0.5, -1e-5).eigh(dtype=torch.float32)
        x = torch.randn(3, 32)
        Factors({"up": LayerFactors(x.T @ x, x.T @ x, 3, 3)}).eigh()
    with pytest.warns(NumericalWarning, match="negative eigenvalues"):
        spectrum(1.0, 0.5, -1e-7).eigh()
    with pytest.warns(NumericalWarning, match="far beyond rounding"):
        spectrum(1.0, 0.5, -1e-3).eigh(dtype=torch.float32)


def test_evidence_of_a_layer_that_it_does_not_name_is_a_convention() -> None:
    found = evidence_of({KEY: evidence(up=rows()).to_dict()}, ["up", "down"])
    assert [found.rows[name].how for name in ("up", "down")] == [PROVEN, CONVENTION]
