"""JSON and YAML that can be read in one way only: what somebody published may be read by other programs than ours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import yaml


_MAX_DIGITS = 20  # of an integer


class AmbiguousFile(ValueError):
    """Two programs may read different values from this text; the message says why, in one printable line."""


def read_json(text: str | bytes) -> Any:
    """
    Reads JSON in UTF-8, in which each key is there once and each number is finite.

    Raises:
        AmbiguousFile: If a key is there twice, or a number is NaN, infinite or too large.
        ValueError: If it is no JSON.
    """
    return json.loads(
        text.decode("utf-8") if isinstance(text, bytes) else text,
        object_pairs_hook=_once,
        parse_constant=_finite,
        parse_float=_finite,
        parse_int=_integer,
    )


def read_yaml(text: str) -> Any:
    """
    Reads YAML of plain values: no key twice, no anchor, alias, merge key or tag, no number that is not finite.

    Raises:
        AmbiguousFile: If it holds one of these, or a value that JSON does not have, such as a date.
        yaml.YAMLError: If it is no YAML.
    """
    values = yaml.load(text, Loader=_PlainLoader)  # a SafeLoader
    try:
        canonical(values)
    except TypeError:
        raise AmbiguousFile("a value is of a type that JSON does not have") from None
    return values


def canonical(values: Any) -> str:
    """One text for equal values of equal types: 1, 1.0 and true differ, the order of keys does not matter."""
    return json.dumps(values, sort_keys=True, allow_nan=False)


def same(first: Any, second: Any) -> bool:
    """True if two values of JSON types are equal, types included."""
    return canonical(first) == canonical(second)


def shorten(text: str, length: int = 80) -> str:
    """Text by somebody else, for a terminal: in ASCII, so that look-alikes and invisible characters show."""
    shown = ascii(text[:length])
    return shown if len(text) <= length else f"{shown}..."


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise AmbiguousFile(f"a key is no text: {shorten(str(key), 40)}")
        if key in values:
            raise AmbiguousFile(f"the key {shorten(key, 40)} is there twice")
        values[key] = value
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise AmbiguousFile(f"{shorten(text, 40)} is not a finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise AmbiguousFile(f"{shorten(text, 40)} is too large a number")
    return int(text)


class _PlainLoader(yaml.SafeLoader):
    """YAML without what has another meaning in another program, or refers to another place of the text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise AmbiguousFile(f"it holds the anchor or alias {shorten(event.anchor, 40)}")
        if getattr(event, "tag", None) is not None:
            raise AmbiguousFile(f"it holds the tag {shorten(event.tag, 40)}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise AmbiguousFile("it holds a merge key")
        pairs = node.value
        return _once(
            (self.construct_object(key, deep=True), self.construct_object(value, deep=True)) for key, value in pairs
        )

    def construct_yaml_float(self, node: Any) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise AmbiguousFile(f"{shorten(node.value, 40)} is not a finite number")
        return value


_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)
