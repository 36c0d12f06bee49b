"""Label order, spellings, integers, and what is refused."""

from __future__ import annotations

import pytest

from pipeline.data.labels import ALIASES, RAVDESS_LABELS, LabelError, LabelSet, canonical_name, mapped, parse_label_map

RAVDESS = LabelSet(RAVDESS_LABELS)


def test_ravdess_order_is_the_contract_and_aliases_lead_to_it() -> None:
    expected = ["angry", "calm", "disgust", "fearful", "happy", "neutral", "sad", "surprised"]
    assert list(RAVDESS.names) == expected
    assert [RAVDESS.index(name) for name in expected] == list(range(8))
    assert set(ALIASES.values()) <= set(expected)
    assert not set(ALIASES) & set(expected)


def test_spellings_and_integers() -> None:
    spellings = {"Fear": 3, " SURPRISE ": 7, "ps": 7, "Pleasant-Surprise": 7, 0: 0, "7": 7, "3.0": 3, 5.0: 5}
    assert {given: RAVDESS.index(given) for given in spellings} == spellings
    numbers = LabelSet(("01", "02", "03"))  # a class of that name goes before an index
    assert [numbers.index(given) for given in (*numbers.names, "1", 1)] == [0, 1, 2, 1, 1]
    assert canonical_name("scared", {"joy": "calm"}) == "fearful"


@pytest.mark.parametrize("given", ["bored", "", "-1", 8, "8", "1.5", True, "nan", "inf"])
def test_what_no_class_has_is_refused_in_one_line(given: str | int) -> None:
    with pytest.raises(LabelError, match=r"angry.*--label_map") as caught:
        RAVDESS.index(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "given", "wanted"),
    [
        ("0=neutral", "0", "neutral"),
        ("0=neutral", "00", "neutral"),
        ("03=sad", "3.0", "sad"),
        ("angry=sad", "0", "sad"),
        ("fear=happy", "Fear", "happy"),
        ("fear=happy", "afraid", "afraid"),
        ("fearful=happy", "fear", "happy"),
        ("fearful=happy", "3", "happy"),
        (" excited = Happiness, Joy=calm", "EXCITED", "happy"),
        ("Joy=calm", "joy", "calm"),
        ("1=angry", "-1", "-1"),
        ("0=calm, angry=sad, anger=happy", "0", "calm"),  # the text given goes before its name
        ("0=calm, angry=sad, anger=happy", "angry", "sad"),
        ("0=calm, angry=sad, anger=happy", "anger", "happy"),
        ("0=calm, angry=sad, anger=happy", "mad", "sad"),
    ],
)
def test_a_label_map_takes_the_text_given_and_the_name_it_stands_for(pairs: str, given: str, wanted: str) -> None:
    mapping = parse_label_map(pairs)
    assert mapped(given, mapping, RAVDESS_LABELS) == wanted
    if wanted != given and not given[0].isdigit():
        assert canonical_name(given, mapping) == wanted


def test_malformed_maps_and_sets_are_refused() -> None:
    for text in ("joy", "joy=", "=calm"):
        with pytest.raises(LabelError, match="given=wanted"):
            parse_label_map(text)
    for names in (("b", "a"), ("a", "a"), ("a",), ()):
        with pytest.raises(LabelError):
            LabelSet(names)
