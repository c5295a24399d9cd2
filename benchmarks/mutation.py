"""Would the tests notice? Small faults are planted in the privacy core, one at a time, and its tests are run on each.

A mutant is a file with one operator, comparison, constant, condition or statement changed. It is killed if a test
fails or does not end. torch and the other libraries are imported once, before a process is forked for each mutant: the
tests of a mutant cost what they cost, and no more. Forked processes leave the files as they are.

    python benchmarks/mutation.py --modules dp_sgd/sampling dp_sgd/dp_optimizer
    python benchmarks/mutation.py --output benchmarks/results/mutation.json

Modules with more than `--sample` mutants are sampled, with a constant seed. With `--cache FILE`, a run goes on where
an earlier one of the same sources ended: what was killed stays killed, for tests are added and not taken away, and
what survived is run again if a test was changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parent.parent
SOURCE, TESTS = ROOT / "src" / "dp_curriculum", ROOT / "tests"
RESULTS = Path(__file__).parent / "results" / "mutation.json"
MAX_BYTES = 12 * 2**30
# Tests that must notice, cheapest first: the first failure ends a run.
_STEPS, _LESSONS = "audit/test_step_replay.py", "audit/test_lesson_replay.py"
_ONE_SUM = "runtime/test_processes.py::test_the_clipped_sum_of_a_draw_is_the_same_on_one_two_and_three_processes"
_ONE_NOISE = "runtime/test_processes.py::test_noise_is_drawn_once_whatever_the_number_of_processes"
_CENTRAL, _MOMENTS = "lessons/test_central_images.py", "lessons/test_moment_images.py"
CORE = {
    "dp_sgd/sampling": ["dp_sgd/test_sampling.py", _ONE_SUM],
    "data/units": ["data/test_units.py", "lessons/test_person_sums.py", "dp_sgd/test_person_steps.py"],
    "lessons/class_sums": ["lessons/test_class_sums.py", "lessons/test_person_sums.py", _CENTRAL, _MOMENTS, _LESSONS],
    "lessons/central_images": [_CENTRAL, _LESSONS],
    "dp_sgd/dp_optimizer": ["dp_sgd/test_dp_optimizer.py", _STEPS, _ONE_SUM, _ONE_NOISE],
    "privacy/randomness": ["privacy/test_randomness.py"],
    "privacy/ledger": ["privacy/test_ledger.py"],
    "privacy/hash_chain": ["privacy/test_ledger.py"],
    "dp_sgd/trainer": ["dp_sgd/test_dp_finetuning.py", _STEPS, _ONE_SUM],
    "privacy/accounting": ["privacy/test_accounting.py"],
}
LIBRARIES = ("torch", "torchvision", "diffusers", "datasets", "opacus", "accelerate", "dp_accounting", "scipy.stats",
             "hypothesis", "sklearn.datasets", "sklearn.linear_model", "cryptography", "PIL.Image", "transformers",
             "opacus.optimizers", "diffusers.training_utils", "diffusers.optimization", "pytest", "filelock",
             "dp_accounting.pld.privacy_loss_distribution", "opacus.accountants", "safetensors.torch")  # fmt: skip

COMPARISONS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}  # fmt: skip
ARITHMETIC: dict[type, list[type]] = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.Mult], ast.Pow: [ast.Mult], ast.BitOr: [ast.BitAnd], ast.BitAnd: [ast.BitOr],
    ast.RShift: [ast.LShift], ast.LShift: [ast.RShift], ast.MatMult: [],
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# What says nothing about the guarantee: messages, and how an object prints.
SKIPPED_FUNCTIONS = ("__repr__",)


class Mutant(NamedTuple):
    """One change: where, and what became what."""

    line: int
    before: str
    after: str
    source: str


# --- making mutants --------------------------------------------------------------------------------------------------


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a file, in order; equal sources once."""
    tree = ast.parse(source)
    found: dict[str, Mutant] = {}
    for number, node in enumerate(_nodes(tree)):
        for changed in _changes(node):
            copied = copy.deepcopy(tree)
            twin = next(node for index, node in enumerate(_nodes(copied)) if index == number)
            _replace(copied, twin, copy.deepcopy(changed))
            text = ast.unparse(ast.fix_missing_locations(copied))
            before, after = ast.unparse(node), "" if isinstance(changed, ast.Pass) else ast.unparse(changed)
            found.setdefault(text, Mutant(getattr(node, "lineno", 0), before[:120], after[:120], text))
    return list(found.values())


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of code that runs: no annotations, docstrings, messages or imports."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_silent(child):
                continue
            yield child
            yield from _nodes(child)


def _is_silent(node: ast.AST) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Raise)):
        return True
    if isinstance(node, ast.FunctionDef) and node.name in SKIPPED_FUNCTIONS:
        return True
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """What one node may become."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                yield ast.Compare(node.left, [*node.ops[:index], other(), *node.ops[index + 1 :]], node.comparators)
    elif isinstance(node, ast.BinOp):
        for other in ARITHMETIC[type(node.op)]:
            yield ast.BinOp(node.left, other(), node.right)
    elif isinstance(node, ast.AugAssign):
        for other in ARITHMETIC[type(node.op)]:
            yield ast.AugAssign(node.target, other(), node.value)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, (ast.If, ast.While)):
        yield type(node)(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Constant):
        yield from _other_constants(node.value)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield ast.Name(NAMES[node.id], node.ctx)
    elif isinstance(node, ast.Expr):  # a call for its effect, which is left out
        yield ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield ast.Break() if isinstance(node, ast.Continue) else ast.Continue()


def _other_constants(value: Any) -> Iterator[ast.Constant]:
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
    elif isinstance(value, float):
        yield ast.Constant(value * 2 if value else 1.0)
    elif isinstance(value, str) and value:
        yield ast.Constant(value + "X")


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list):
                value[:] = [new if entry is old else entry for entry in value]


# --- running tests ---------------------------------------------------------------------------------------------------


def run_tests(module: str, source: str, tests: Sequence[str], *, timeout: float, log: Path | None = None) -> str:
    """Runs tests in a process of their own, with this source for a module: "survived", "killed" or "timeout"."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    shutil.copytree(SOURCE, folder / "src" / SOURCE.name)  # with its bytecode
    (folder / "src" / SOURCE.name / f"{module}.py").write_text(source, encoding="utf-8")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        status = 99
        try:
            status = _run_in_child(tests, folder, log)
        finally:
            os._exit(status)
    status, ends = None, time.monotonic() + timeout
    while status is None and time.monotonic() < ends:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # also what the tests have left running
    if status is None:
        os.waitpid(pid, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return "timeout" if status is None else "survived" if status == 0 else "killed"


def _run_in_child(tests: Sequence[str], folder: Path, log: Path | None) -> int:
    os.environ.update(TMPDIR=str(folder), HYPOTHESIS_STORAGE_DIRECTORY=str(folder), PYTHONPATH=str(folder / "src"))
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))  # a mutant may ask for all there is
    output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    sys.path.insert(0, str(folder / "src"))
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    return int(pytest.main([*options, *(str(TESTS / name) for name in tests)]))


def warm_up() -> None:
    """Imports what all tests need, and nothing of the package."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=tempfile.mkdtemp(prefix="mutation-home-"))
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    assert "dp_curriculum" not in sys.modules


# --- the benchmark ---------------------------------------------------------------------------------------------------


class Cache:
    """Outcomes of earlier runs, one line each, by the mutated source and the tests."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.held = path, {}
        if path is not None and path.exists():
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self.held = {row["mutant"]: row for row in rows}

    def look_up(self, mutant: str, tests: str) -> str | None:
        row = self.held.get(mutant)
        if row is None or (row["outcome"] == "survived" and row["tests"] != tests):
            return None
        return str(row["outcome"])

    def add(self, mutant: str, tests: str, outcome: str) -> None:
        self.held[mutant] = {"mutant": mutant, "tests": tests, "outcome": outcome}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.held[mutant]) + "\n")


def run_module(module: str, cache: Cache, *, sample: int, seed: int) -> dict[str, Any]:
    """Runs the tests of a module on it as it is, then on its mutants."""
    source = (SOURCE / f"{module}.py").read_text(encoding="utf-8")
    tests, tests_hash = CORE[module], _hash_of_tests(module)
    started = time.monotonic()
    log = Path(tempfile.gettempdir()) / f"mutation-baseline-{module.replace('/', '-')}.log"
    if run_tests(module, source, tests, timeout=1800, log=log) != "survived":
        raise SystemExit(f"The tests of {module} fail on the file as it is: see {log}.")
    baseline = time.monotonic() - started
    everything = mutants_of(source)
    chosen = everything
    if len(everything) > sample:
        chosen = sorted(random.Random(seed).sample(everything, sample), key=everything.index)
    survivors, counts = [], {"killed": 0, "timeout": 0, "survived": 0}
    for number, mutant in enumerate(chosen, start=1):
        key = _sha256(mutant.source)
        outcome = cache.look_up(key, tests_hash)
        if outcome is None:
            outcome = run_tests(module, mutant.source, tests, timeout=4 * baseline + 60)
            cache.add(key, tests_hash, outcome)
        counts[outcome] += 1
        if outcome == "survived":
            survivors.append({"line": mutant.line, "before": mutant.before, "after": mutant.after})
        print(
            f"{module} {number}/{len(chosen)} {outcome:<8} line {mutant.line}: {mutant.before!r} -> {mutant.after!r}"
        )
        sys.stdout.flush()
    return {
        "source": _sha256(source)[:16],
        "mutants": len(everything),
        "sample": {"at_most": sample, "seed": seed},
        "run": len(chosen),
        **counts,
        "killed_share": round((counts["killed"] + counts["timeout"]) / len(chosen), 4),
        "tests": tests,
        "survivors": survivors,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_of_tests(module: str) -> str:
    return _sha256("".join((TESTS / name.split("::")[0]).read_text(encoding="utf-8") for name in CORE[module]))


def summary(modules: dict[str, Any]) -> dict[str, Any]:
    run = sum(entry["run"] for entry in modules.values())
    killed = sum(entry["killed"] + entry["timeout"] for entry in modules.values())
    return {"run": run, "killed": killed, "killed_share": round(killed / run, 4) if run else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=list(CORE), choices=list(CORE))
    parser.add_argument("--sample", type=int, default=120, help="Most mutants of a module.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sample.")
    parser.add_argument("--list", action="store_true", help="Count mutants; run nothing.")
    parser.add_argument("--cache", type=Path, help="Outcomes of earlier runs; lines are added.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.list:
        for module in given.modules:
            print(f"{module:<16} {len(mutants_of((SOURCE / f'{module}.py').read_text(encoding='utf-8')))}")
        return
    warm_up()
    cache = Cache(given.cache)
    held = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {"modules": {}}
    for module in given.modules:
        held["modules"][module] = run_module(module, cache, sample=given.sample, seed=given.seed)
        held = {"python": sys.version.split()[0], "total": summary(held["modules"]), "modules": held["modules"]}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(held["total"]))


if __name__ == "__main__":
    main()
