"""Text that two programs may read differently is refused, and equal is equal in type as well."""

from __future__ import annotations

import pytest
import yaml

from dp_curriculum.sharing.strict import AmbiguousFile, read_json, read_yaml, same, shorten


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' is there twice"),
        ('{"b": [{"a": 1, "\\u0061": 2}]}', "the key 'a' is there twice"),
        ("[NaN]", "'NaN' is not a finite number"),
        ("[-Infinity]", "'-Infinity' is not a finite number"),
        ("[1e999]", "'1e999' is not a finite number"),
        (f"[{'9' * 30}]", "is too large a number"),
    ],
)
def test_json_that_can_be_read_in_two_ways_is_refused(text: str, said: str) -> None:
    with pytest.raises(AmbiguousFile, match=said) as caught:
        read_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2\n", "the key 'a' is there twice"),
        ("a: {b: 1, 'b': 2}\n", "the key 'b' is there twice"),
        ("a: &x 1\nb: *x\n", "anchor or alias 'x'"),
        ("a: &a [*a]\n", "anchor or alias 'a'"),
        ("base: {x: 1}\n<<: {y: 2}\n", "a merge key"),
        ("a: !!float 1\n", "the tag"),
        ("a: ! 1\n", "the tag"),
        ("a: !!python/object/apply:os.system [id]\n", "the tag"),
        ("a: .nan\n", "'.nan' is not a finite number"),
        ("a: [-.inf]\n", "'-.inf' is not a finite number"),
        ("a: 2026-01-01\n", "of a type that JSON does not have"),
        ("1: 2\n", "a key is no text"),
    ],
)
def test_yaml_that_can_be_read_in_two_ways_is_refused(text: str, said: str) -> None:
    with pytest.raises(AmbiguousFile, match=said) as caught:
        read_yaml(text)
    assert "\n" not in str(caught.value)


def test_plain_values_are_read_as_they_are() -> None:
    values = {"a": [1, 2.5, True, None, "x: y"], "b": {"c": "größer"}, "d": []}
    assert read_yaml(yaml.safe_dump(values, allow_unicode=True)) == values
    assert read_json(b'{"a": [1, 2.5, true, null]}') == {"a": [1, 2.5, True, None]}
    with pytest.raises(UnicodeDecodeError):
        read_json('{"a": 1}'.encode("utf-16"))


def test_equal_values_of_other_types_are_not_the_same() -> None:
    assert same({"a": 1, "b": [0.5]}, {"b": [0.5], "a": 1})
    for other in ({"a": 1.0}, {"a": True}, {"a": "1"}, {"a": [1]}, {}):
        assert not same({"a": 1}, other)
    assert not same(0.0, -0.0)


def test_what_others_wrote_is_shown_in_ascii_and_short() -> None:
    assert shorten("\u0435psilon\u200b\x1b[2J") == "'\\u0435psilon\\u200b\\x1b[2J'"
    assert shorten("a" * 100, 10) == "'aaaaaaaaaa'..."
