"""Plants a fault: the source of a function is changed and put in its place, wherever the package holds it."""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any

import pytest


Change = tuple[str, str]


def plant(patch: pytest.MonkeyPatch, owner: Any, name: str, *changes: Change) -> None:
    """
    Replaces text in the source of `owner.name` until `patch` is undone.

    Args:
        patch (`pytest.MonkeyPatch`): Undoes it.
        owner: A module, or a class.
        name (`str`): Of a function, a method or a property.
        changes (`tuple[str, str]`): Text that occurs once, and what takes its place.
    """
    held = vars(owner)[name]
    function = held.fget if isinstance(held, property) else getattr(held, "__func__", held)
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, f"{name} holds {source.count(old)} times: {old}"
        source = source.replace(old, new)
    if inspect.isclass(owner):
        source = source.replace("super()", "super(_owner, self)")
        patch.setitem(function.__globals__, "_owner", owner)
    namespace: dict[str, Any] = {}
    exec(compile(source, f"<fault in {name}>", "exec"), function.__globals__, namespace)
    if inspect.isclass(owner):
        patch.setattr(owner, name, namespace[name])
        return
    for module in list(sys.modules.values()):  # also those that imported it by name
        if getattr(module, "__name__", "").startswith(("dp_curriculum", "test_")):
            for alias, value in list(vars(module).items()):
                if value is held:
                    patch.setattr(module, alias, namespace[name])
