"""A row of the ledger survives strict JSON, whatever it holds."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
BY_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "str": TEXTS,
    "int": st.integers(),
    "int | None": st.none() | st.integers(),
    "bool | None": st.none() | st.booleans(),
    "float | None": st.none() | FLOATS,
    "Interval[float] | None": st.none() | st.builds(Interval, FLOATS, FLOATS, FLOATS),
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
