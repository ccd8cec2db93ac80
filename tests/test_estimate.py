"""A row of the ledger survives strict JSON, whatever it holds."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_privacy.audit.curve import ExampleLeakage, LeakageCurve
from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.interval import Interval

FLOATS = st.floats(allow_nan=True, allow_infinity=True)
TEXTS = st.text(alphabet=st.characters(exclude_categories=())) | st.sampled_from(["NaN", "-Infinity", "=NaN", "==NaN"])
SETTINGS = st.dictionaries(
    TEXTS,
    st.recursive(
        st.none() | st.booleans() | st.integers() | FLOATS | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
CURVES = st.lists(st.tuples(*[FINITE] * 4), max_size=4).map(
    lambda points: LeakageCurve(
        **{name: tuple(p[i] for p in points) for i, name in enumerate(("noise_std", "lower", "value", "upper"))}
    )
)
EXAMPLES = st.builds(
    ExampleLeakage,
    index=st.integers(),
    label=st.none() | st.integers(),
    leakage=FINITE,
    required_noise_std=FINITE,
)
BY_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "str": TEXTS,
    "int": st.integers(),
    "int | None": st.none() | st.integers(),
    "bool | None": st.none() | st.booleans(),
    "float | None": st.none() | FLOATS,
    "Interval[float] | None": st.none() | st.builds(Interval, FLOATS, FLOATS, FLOATS),
    "LeakageCurve | None": st.none() | CURVES,
    "tuple[ExampleLeakage, ...]": st.lists(EXAMPLES, max_size=3).map(tuple),
    "Status": st.sampled_from(Status),
    "Source": st.sampled_from(Source),
    "Mapping[str, Any]": SETTINGS,
    "Mapping[str, str]": st.dictionaries(TEXTS, TEXTS, max_size=3),
}
ESTIMATES = st.fixed_dictionaries({item.name: BY_TYPE[str(item.type)] for item in fields(LeakageEstimate)}).map(
    lambda values: LeakageEstimate(**values)
)


def same(left: Any, right: Any) -> bool:
    """Equality of value and type in which NaN equals NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@settings(deadline=None, max_examples=200)
@given(ESTIMATES)
def test_a_row_survives_strict_json(estimate: LeakageEstimate) -> None:
    text = json.dumps(estimate.to_dict(), allow_nan=False)
    restored = LeakageEstimate.from_dict(json.loads(text))
    for item in fields(LeakageEstimate):
        before, after = getattr(estimate, item.name), getattr(restored, item.name)
        assert same(before, after), f"{item.name}: {before!r} came back as {after!r}"


def test_non_finite_numbers_are_readable_texts() -> None:
    row = LeakageEstimate(
        server_round=1,
        client="3",
        status=Status.UNVERIFIED,
        snr_db=math.inf,
        psnr=-math.inf,
        leakage=Interval(0.0, math.nan, 1.0),
        settings={"limit": math.inf, "name": "Infinity"},
    ).to_dict()
    assert (row["snr_db"], row["psnr"], row["leakage"]) == ("Infinity", "-Infinity", [0.0, "NaN", 1.0])
    assert row["settings"] == {"limit": "Infinity", "name": "=Infinity"}


def test_a_client_called_nan_stays_a_name() -> None:
    row = LeakageEstimate(server_round=1, client="NaN", status=Status.LATE, detail="Infinity")
    assert LeakageEstimate.from_dict(row.to_dict()) == row


def test_a_row_of_a_newer_version_is_read() -> None:
    row = LeakageEstimate(server_round=1, client="3", status=Status.AUDITED)
    assert LeakageEstimate.from_dict({**row.to_dict(), "invented_later": 1}) == row


@pytest.mark.parametrize(
    ("held", "words"), [({"model": {1, 2}}, r"settings\['model'\] is a set"), ({"layers": [{1: "a"}]}, "has the key 1")]
)
def test_what_json_cannot_hold_is_named(held: dict[str, Any], words: str) -> None:
    row = LeakageEstimate(server_round=1, client="3", status=Status.AUDITED, settings=held)
    with pytest.raises(TypeError, match=words):
        row.to_dict()


def test_an_unknown_status_is_an_error() -> None:
    row = LeakageEstimate(server_round=1, client="3", status=Status.AUDITED).to_dict()
    with pytest.raises(ValueError, match="'safe' is not a valid Status"):
        LeakageEstimate.from_dict({**row, "status": "safe"})


class TestCurve:
    CURVE = LeakageCurve(noise_std=(0.0123456, 0.1), lower=(0.88888, 0.0), value=(0.99994, 0.1), upper=(0.99991, 0.1))

    def test_rounding_moves_bounds_outwards(self) -> None:
        rounded = self.CURVE.rounded()
        assert rounded.noise_std == (0.01235, 0.1)
        assert (rounded.lower, rounded.value, rounded.upper) == ((0.8888, 0.0), (0.9999, 0.1), (1.0, 0.1))

    def test_predicted_error(self) -> None:
        assert self.CURVE.rmse(0.5)[1] == pytest.approx(0.5 * math.sqrt(0.9))

    def test_rows_from_before_there_were_curves_and_from_after_are_read(self) -> None:
        row = LeakageEstimate(server_round=1, client="3", status=Status.AUDITED, curve=self.CURVE)
        old = {name: value for name, value in row.to_dict().items() if name not in ("curve", "examples")}
        assert LeakageEstimate.from_dict(old) == LeakageEstimate(server_round=1, client="3", status=Status.AUDITED)
        newer = {**row.to_dict(), "curve": {"version": 2, "knots": []}}
        assert LeakageEstimate.from_dict(newer).curve is None

    @pytest.mark.parametrize(
        "changes",
        [
            {"curve": {"version": 1, "noise_std": [1.0], "lower": [], "value": [0.1], "upper": [0.1]}},
            {"curve": {"version": 1, "noise_std": "<script>", "lower": [], "value": [], "upper": []}},
            {"examples": [[0, 1, 0.5]]},
            {"examples": [["0", 1, 0.5, 0.1]]},
        ],
    )
    def test_a_malformed_one_is_an_error(self, changes: dict[str, Any]) -> None:
        row = LeakageEstimate(server_round=1, client="3", status=Status.AUDITED)
        with pytest.raises(ValueError, match="expected"):
            LeakageEstimate.from_dict({**row.to_dict(), **changes})
