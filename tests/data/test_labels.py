"""Label order, spellings, integers, and what is refused."""

from __future__ import annotations

import pytest

from pipeline.data.labels import ALIASES, RAVDESS_LABELS, LabelError, LabelSet, canonical_name, mapped, parse_label_map

RAVDESS = LabelSet(RAVDESS_LABELS)


def test_ravdess_order_is_the_contract() -> None:
    expected = ["angry", "calm", "disgust", "fearful", "happy", "neutral", "sad", "surprised"]
    assert list(RAVDESS.names) == expected
    assert [RAVDESS.index(name) for name in expected] == list(range(8))


def test_every_alias_names_a_ravdess_class_and_is_none_itself() -> None:
    assert set(ALIASES.values()) <= set(RAVDESS_LABELS)
    assert not set(ALIASES) & set(RAVDESS_LABELS)


@pytest.mark.parametrize(
    ("given", "index"),
    [
        ("Fear", 3),
        (" SURPRISE ", 7),
        ("ps", 7),
        ("Pleasant-Surprise", 7),
        (0, 0),
        ("7", 7),
        ("3.0", 3),
        (5.0, 5),
    ],
)
def test_spellings_and_integers(given: str | int, index: int) -> None:
    assert RAVDESS.index(given) == index


def test_a_class_of_that_name_goes_before_an_index() -> None:
    numbers = LabelSet(("01", "02", "03"))
    assert [numbers.index(name) for name in numbers.names] == [0, 1, 2]
    assert (numbers.index("1"), numbers.index(1)) == (1, 1)


@pytest.mark.parametrize("given", ["bored", "", "-1", 8, "8", "1.5", True, "nan", "inf"])
def test_what_no_class_has_is_refused_in_one_line(given: str | int) -> None:
    with pytest.raises(LabelError) as caught:
        RAVDESS.index(given)
    assert "\n" not in str(caught.value)
    assert "angry" in str(caught.value)
    assert "--label_map" in str(caught.value)


def test_label_map_goes_before_aliases() -> None:
    mapping = parse_label_map("Joy=calm, excited = happy")
    assert canonical_name("joy", mapping) == "calm"
    assert canonical_name("EXCITED", mapping) == "happy"
    assert canonical_name("fear", mapping) == "fearful"


@pytest.mark.parametrize(
    ("pair", "given", "wanted"),
    [
        ("0=neutral", "0", "neutral"),
        ("0=neutral", "00", "neutral"),
        ("03=sad", 3.0, "sad"),
        ("angry=sad", "0", "sad"),
        ("fear=happy", "Fear", "happy"),
        ("fear=happy", "afraid", "fearful"),
        ("fearful=happy", "fear", "happy"),
        ("fearful=happy", "3", "happy"),
        ("excited=Happiness", "excited", "happy"),
        ("1=angry", "-1", "-1"),
    ],
)
def test_a_label_map_takes_the_text_given_and_the_name_it_stands_for(
    pair: str, given: str | float, wanted: str
) -> None:
    cell = mapped(str(given), parse_label_map(pair), RAVDESS_LABELS)
    assert (canonical_name(cell) if cell != "-1" else cell) == wanted


def test_the_text_given_goes_before_its_name() -> None:
    mapping = parse_label_map("0=calm, angry=sad, anger=happy")
    assert [mapped(text, mapping, RAVDESS_LABELS) for text in ("0", "angry", "anger", "mad")] == [
        *("calm", "sad", "happy", "sad")
    ]


@pytest.mark.parametrize("text", ["joy", "joy=", "=calm"])
def test_malformed_label_map(text: str) -> None:
    with pytest.raises(LabelError, match="given=wanted"):
        parse_label_map(text)


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a"), ("a",), ()])
def test_a_label_set_is_sorted_unique_and_of_two_at_least(names: tuple[str, ...]) -> None:
    with pytest.raises(LabelError):
        LabelSet(names)
