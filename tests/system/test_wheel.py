"""A wheel works where the repository is not: in an environment that holds nothing but it and its dependencies."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, folder: Path) -> Path:
    """A wheel by `python -m build`, or by pip where that is not installed: both ask the same build backend."""
    if importlib.util.find_spec("build") is not None:
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    else:
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
        run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment into which a wheel was installed; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    (folder / "dist").mkdir()
    wheel = build(source, folder / "dist")
    shutil.rmtree(source)
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    options = ("--no-deps", "--no-index", "--quiet")
    run(
        sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", *options, wheel, cwd=folder
    )
    own = Path(run(environment / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                   cwd=folder).strip())  # fmt: skip
    # A path file leads to the dependencies; the path files there, as of an editable installation, do not count.
    (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return environment


@pytest.mark.skipif(os.name != "posix", reason="an environment has other folders there")
def test_a_wheel_plans_outside_of_the_repository(installed: Path, tmp_path: Path) -> None:
    program = "import dp_curriculum; print(dp_curriculum.__file__)"
    assert Path(run(installed / "bin" / "python", "-c", program, cwd=tmp_path).strip()).is_relative_to(installed)
    plan = run(
        installed / "bin" / "dp-curriculum", "plan", "--no_estimate", "--dataset_name", "digits", "--resolution", "8",
        cwd=tmp_path,
    )  # fmt: skip
    assert "epsilon alone" in plan and "target: epsilon 10" in plan


@pytest.mark.skipif(os.name != "posix", reason="an environment has other folders there")
def test_a_wheel_holds_what_is_no_code(installed: Path) -> None:
    package = next(installed.glob("lib*/python*/site-packages/dp_curriculum"))
    source = ROOT / "src" / "dp_curriculum"
    kept = {
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert kept <= {path.relative_to(package) for path in package.rglob("*")}
    assert {path.suffix for path in kept} == {".py", ".json", ".typed"}
