"""Coverage says which rows counted, who said so, and how sure that is; and why a layer has none."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
from torch import nn

from curvfast.collection.coverage import Coverage, Skipped, describe
from curvfast.collection.hooks import Calls
from curvfast.collection.uncovered import require_rows, uncalled
from curvfast.errors import CoverageError, NumericalWarning
from curvfast.kfac.evidence import Evidence
from curvfast.kfac.known import CONVENTION, PROVEN, TOLD, Known
from curvfast.model.layers import select

NOT_LAST = Known("real positions but the last of each sequence", "logits' gradient", PROVEN)
GIVEN = Known("rows= of the caller", "rows=", TOLD)
UNIT = Known("1/s of a mean cross-entropy", "logits' gradient", PROVEN)


def shown(layers: int = 32, **changes: object) -> Coverage:
    rows = {f"layers.{i}.up": NOT_LAST for i in range(layers)} | {"router": GIVEN}
    full = {"covered": {"up": 3}, "uncovered": {}, "fraction": 0.5, "sum_bytes": 8, "rows": rows}
    return Coverage(**{**full, "unit": UNIT, **changes})


class Sums:
    """Rows of each layer."""

    def __init__(self, **rows: int) -> None:
        self._rows = rows

    def rows(self, name: str) -> tuple[int, int]:
        return self._rows[name], self._rows[name]


SEEN, NEVER = Calls(forward=2, gradients=2), Calls()


def test_rules_are_told_once_for_all_layers_of_one() -> None:
    lines = str(shown()).splitlines()
    assert "     32 layers: real positions but the last of each sequence" in lines[1]
    assert lines[1].endswith("(proven: logits' gradient)")
    assert lines[2].strip() == "1 layers: rows= of the caller (told: rows=)"
    assert "unit of G: 1/s of a mean cross-entropy (proven: logits' gradient)" in str(shown())
    assert len(lines) == 4


def test_a_share_left_out_is_told_with_its_layer_and_is_no_rule_of_its_own() -> None:
    leaking = {f"layers.{i}.up": replace(NOT_LAST, left_out=i / 100) for i in range(4)}
    lines = str(shown(rows=leaking)).splitlines()
    assert lines[1].split() == ["4", "layers:", *str(NOT_LAST).split()]
    assert "3 layers have a gradient in rows left out, up to 0.03" in lines[2]
    assert "'layers.3.up'" in lines[2]


def test_batches_that_were_not_finite_are_told_with_their_numbers() -> None:
    few, many = Skipped(2, (3, 7)), Skipped(90, tuple(range(30)))
    text = str(shown(skipped={"a": few, "b": few, "c": many}))
    assert "2 layers left out 2 batches that were not finite (number 3, 7)" in text
    assert "1 layers left out 90 batches that were not finite (number 0, 1, 2," in text
    assert "7, …)" in text


def test_a_coverage_is_jsonable_with_its_rules() -> None:
    found = json.loads(json.dumps(shown(skipped={"a": Skipped(1, (2,))}).to_dict()))
    assert Evidence.from_dict(found) == Evidence(UNIT, shown().rows)
    assert found["skipped"] == {"a": {"count": 1, "batches": [2]}}


def test_a_description_holds_what_is_known_of_the_chosen_layers() -> None:
    model = nn.ModuleDict({"up": nn.Linear(3, 4), "spare": nn.Linear(3, 2)})
    chosen = select(model, "all")
    found = describe(
        model, chosen, {"up": 5}, [], 0, uncalled=["spare"],
        evidence=Evidence(UNIT, {"up": GIVEN, "other": GIVEN}),
        skipped={"up": Skipped(1, (0,)), "spare": Skipped(0, ())},
    )  # fmt: skip
    assert found.covered == {"up.weight": 5}
    assert found.uncovered["spare.weight"] == "the model never called it"
    assert (found.rows, found.unit) == ({"up": GIVEN}, UNIT)
    assert found.skipped == {"up": Skipped(1, (0,))}
    plain = describe(model, chosen, {"up": 5, "spare": 5}, [], 0)
    assert (plain.rows, plain.unit, plain.skipped) == ({}, None, {})
    assert str(replace(plain, rows={"up": replace(GIVEN, how=CONVENTION)})).count("convention") == 1


# --- layers without rows --------------------------------------------------------------------------


def test_a_layer_never_called_is_left_out_by_kind_and_refused_by_name() -> None:
    sums, calls = Sums(up=9, spare=0), {"up": SEEN, "spare": NEVER}
    skipped = dict.fromkeys(calls, 0)
    with pytest.warns(NumericalWarning, match="'spare'.*its hook never fired"):
        assert require_rows(calls, sums, calls, skipped, by_kind=True) == ["spare"]
    with pytest.raises(CoverageError, match="'spare': its hook never fired"):
        require_rows(calls, sums, calls, skipped)


def test_by_kind_a_layer_that_was_called_without_a_gradient_is_refused_still() -> None:
    sums, calls = Sums(up=9, below=0), {"up": SEEN, "below": Calls(forward=2, without_grad=2)}
    with pytest.raises(CoverageError, match="never required a gradient"):
        require_rows(calls, sums, calls, dict.fromkeys(calls, 0), by_kind=True)


def test_where_the_model_called_no_layer_at_all_that_is_an_error_by_kind_too() -> None:
    calls = {"up": NEVER, "down": NEVER}
    with pytest.raises(CoverageError, match="compiled before collect"):
        require_rows(calls, Sums(up=0, down=0), calls, dict.fromkeys(calls, 0), by_kind=True)


def test_layers_with_rows_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert require_rows(["up"], Sums(up=9), {"up": SEEN}, {"up": 0}, by_kind=True) == []


def test_an_expert_that_rested_was_called() -> None:
    assert uncalled(["expert"], {"expert": Calls(resting=3)}) == []


@pytest.mark.parametrize("why", ["without calling the module", "compiled before collect"])
def test_the_message_names_each_likely_cause(why: str) -> None:
    with pytest.raises(CoverageError, match=why):
        require_rows(["up"], Sums(up=0), {"up": NEVER}, {"up": 0})


def test_calls_inside_a_transform_are_told_as_such() -> None:
    calls = Calls(transformed=3)
    with pytest.raises(CoverageError, match=r"all of its 3 calls .*torch\.func"):
        require_rows(["up"], Sums(up=0), {"up": calls}, {"up": 0})
