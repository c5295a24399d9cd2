"""The documentation site: every page is in its menu, and links lead to where the site has their targets."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site_pages() -> ModuleType:
    return load_script("docs/site_pages.py")


def test_every_page_is_in_the_menu_once(site_pages: ModuleType) -> None:
    menu = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(menu) == sorted(site_pages.FILE_OF)


@pytest.mark.parametrize(
    ("text", "file", "expected"),
    [
        ("[a](docs/method.md#b)", "README.md", "[a](method.md#b)"),
        ("[a](../README.md)", "docs/method.md", "[a](index.md)"),
        ("[a](../docs/cli.md)", "examples/README.md", "[a](cli.md)"),
        ("[a](examples/README.md)", "README.md", "[a](examples.md)"),
        ("![a](docs/images/mnist-eps10-cpu.png)", "README.md", "![a](images/mnist-eps10-cpu.png)"),
        ("[`a.json`](../benchmarks/results/gpu.json)", "docs/scaling.md", "`a.json`"),
        ("![a](../benchmarks/results/world_size.png)", "docs/scaling.md", "*a*"),
        ("[a](https://opacus.ai), [b](#c)", "README.md", "[a](https://opacus.ai), [b](#c)"),
        ("`[a](nowhere.md)`", "README.md", "`[a](nowhere.md)`"),
    ],
)
def test_links_lead_to_pages_of_the_site(text: str, file: str, expected: str, site_pages: ModuleType) -> None:
    assert site_pages.relinked(text, file) == expected


def test_a_link_to_nothing_ends_the_build(site_pages: ModuleType) -> None:
    with pytest.raises(FileNotFoundError, match="README.md links to nowhere.md"):
        site_pages.relinked("[a](nowhere.md)", "README.md")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_without_its_tools_the_target_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "site", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0 and "make site-tools installs it" in done.stderr


def test_the_reference_names_what_there_is() -> None:
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.M):
        module, _, member = name.rpartition(".")
        try:
            found = hasattr(importlib.import_module(module), member)
        except ModuleNotFoundError:
            found = False
        assert found or importlib.util.find_spec(name) is not None, f"{name} ({sys.version})"
