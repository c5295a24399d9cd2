"""The floors of the package: a file imports files of its own floor or a lower one, in no circle, and each floor the
libraries that are allowed there. All of it is read from the source; nothing is imported.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


SOURCE = Path(__file__).parent.parent / "src" / "dp_curriculum"
PACKAGE = "dp_curriculum"

FLOORS: dict[int, set[str]] = {
    0: {
        "accounting",
        "execution",
        "hash_chain",
        "hashing",
        "limits",
        "ledger",
        "privacy_report",
        "config",
        "config_sections",
        "verification",
        "metrics",
        "storage",
        "strict",
        "markdown",
    },
    1: {
        "randomness",
        "data",
        "data.columns",
        "data.decoding",
        "data.image_folder",
        "data.images",
        "data.inspection",
        "data.places",
        "data.reading",
        "data.sources",
        "data.tables",
        "data.workers",
        "sampling",
        "central_images",
        "class_sums",
        "moment_images",
        "frequency_images",
        "edm",
        "layer_gradients",
        "opaque_layer",
        "layer_plan",
        "gradient_engine",
        "gradient_check",
        "per_image_gradients",
        "pipeline_dp_curriculum",
        "inception",
        "precision",
        "witnesses",
    },
    2: {
        "sheets",
        "lesson",
        "lessons",
        "public_images",
        "plan",
        "cost_estimate",
        "checkpointing",
        "processes",
        "trackers",
        "pretraining",
        "dp_optimizer",
        "dp_finetuning",
        "classifiers",
        "evaluation",
        "evaluation_report",
        "synthetic_dataset",
        "leakage",
    },
    3: {
        "run_folder",
        "rehearsal",
        "run_contents",
        "run",
        "resuming",
        "stages",
        "scan",
        "export",
        "hub",
        "published",
        "published_files",
        "card_check",
        "report_words",
        "dataset_card",
        "finishing",
        "model_card",
        "curriculum",
        "audit",
        "audit.canary",
        "audit.findings",
        "audit.frozen",
        "audit.laws",
        "audit.lesson_replay",
        "audit.neighbours",
        "audit.report",
        "audit.step_audit",
        "audit.step_replay",
        "audit.whole_run",
    },
    4: {
        "cli",
        "commands",
        "commands.arguments",
        "commands.audit",
        "commands.evaluate",
        "commands.inspect",
        "commands.plan",
        "commands.push",
        "commands.sample",
        "commands.synthesize",
        "commands.train",
        "commands.verify",
    },
    5: {"__init__"},  # what users import: it may name anything
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}

# First floor on which a library may be used. `accelerate.utils` is its tensors between processes, without the rest.
LIBRARIES = {
    **dict.fromkeys(("numpy", "scipy", "dp_accounting", "filelock", "yaml", "jsonschema"), 0),
    **dict.fromkeys(("torch", "opacus", "diffusers", "datasets", "accelerate.utils"), 1),
    **dict.fromkeys(("PIL", "sklearn", "fsspec", "tqdm", "cryptography", "pyarrow"), 1),
    "torch_fidelity": 1,
    **dict.fromkeys(("accelerate", "safetensors", "transformers", "matplotlib"), 2),
    "huggingface_hub": 3,
}
SHIPPED = "pipeline_dp_curriculum"  # goes into every pushed repository
FORBIDDEN_CALLS = {
    "torch.load": "a pickle is read",
    "torch.save": "a pickle is written",
    "torch.manual_seed": "the global generator is seeded",
    "torch.cuda.manual_seed": "the global generator is seeded",
    "torch.cuda.manual_seed_all": "the global generator is seeded",
    "torch.seed": "the global generator is seeded",
    "np.random.seed": "the global generator is seeded",
    "numpy.random.seed": "the global generator is seeded",
    "random.seed": "the global generator is seeded",
    "set_seed": "the global generators are seeded",
}
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    paths = {path: path.relative_to(SOURCE).with_suffix("") for path in sorted(SOURCE.rglob("*.py"))}
    names = {path: ".".join(inside.parts).removesuffix(".__init__") for path, inside in paths.items()}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in names.items()}


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything that is imported anywhere in a file, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.Module) -> set[str]:
    """Files of this package that a file imports."""
    names = (name.removeprefix(f"{PACKAGE}.") for name in imported(tree) if name.split(".")[0] == PACKAGE)
    # The longest name that is a file: "commands.sample.load_pipeline" is a function of "commands.sample".
    known = ([file for file in FLOOR if f"{name}.".startswith(f"{file}.")] for name in names)
    return {max(files, key=len, default="__init__") for files in known}


def library_imports(tree: ast.Module) -> set[str]:
    """Third-party libraries that a file imports, by the longest name that `LIBRARIES` knows."""
    found = set()
    for name in imported(tree):
        top = name.split(".")[0]
        if top != PACKAGE and top not in sys.stdlib_module_names and top != "__future__":
            prefixes = [known for known in LIBRARIES if f"{name}.".startswith(f"{known}.")]
            found.add(max(prefixes, key=len, default=top))
    return found


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node.lineno


def upward_imports(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})"
        for name, tree in trees.items()
        for other in sorted(own_imports(tree))
        if FLOOR[other] > FLOOR[name]
    ]


def cycles(trees: dict[str, ast.Module]) -> list[str]:
    """What is left after files without imports among the rest were taken away, again and again."""
    graph = {name: own_imports(tree) & trees.keys() for name, tree in trees.items()}
    while free := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in free}
    return sorted(graph)


def misplaced_libraries(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{name} (floor {FLOOR[name]}) imports {library}, allowed from floor {LIBRARIES.get(library, 'none')}"
        for name, tree in trees.items()
        for library in sorted(library_imports(tree))
        if LIBRARIES.get(library, 99) > FLOOR[name]
    ]


def forbidden(trees: dict[str, ast.Module]) -> list[str]:
    found = []
    for name, tree in trees.items():
        for call, line in calls(tree):
            if call in FORBIDDEN_CALLS or call.rsplit(".", 1)[-1] == "set_seed":
                found.append(f"{name}:{line} calls {call}: {FORBIDDEN_CALLS.get(call, 'the generators are seeded')}")
            if call == "print" and name.split(".")[0] not in ("cli", "commands"):
                found.append(f"{name}:{line} prints")
        found += [f"{name} imports {top}" for top in {n.split(".")[0] for n in imported(tree)} & FORBIDDEN_IMPORTS]
    return found


def test_every_file_has_a_floor() -> None:
    assert set(modules()) == set(FLOOR), "give a new file its floor in FLOORS, and take a removed one out"
    assert sum(map(len, FLOORS.values())) == len(FLOOR), "one floor a file"


def test_no_file_imports_a_higher_floor() -> None:
    assert upward_imports(modules()) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert cycles(modules()) == []


def test_no_library_is_used_below_its_floor() -> None:
    assert misplaced_libraries(modules()) == []


def test_what_is_shipped_imports_torch_and_diffusers_alone() -> None:
    tree = modules()[SHIPPED]
    assert library_imports(tree) <= {"torch", "diffusers"}
    assert own_imports(tree) == set()


def test_no_pickle_no_global_seed_and_no_print() -> None:
    assert forbidden(modules()) == []


@pytest.mark.parametrize(
    ("name", "source", "check"),
    [
        ("edm", "from dp_curriculum.cli import main", upward_imports),
        ("edm", "def f():\n    import dp_curriculum.run", upward_imports),
        ("config", "from dp_curriculum import plan", upward_imports),
        ("ledger", "import torch", misplaced_libraries),
        ("config", "from torch.nn import functional", misplaced_libraries),
        ("sampling", "from accelerate import Accelerator", misplaced_libraries),
        ("edm", "import transformers", misplaced_libraries),
        ("cli", "import requests", misplaced_libraries),
        ("run", "import torch\ntorch.load('x')", forbidden),
        ("run", "from accelerate.utils import set_seed\nset_seed(0)", forbidden),
        ("data", "import numpy as np\nnp.random.seed(0)", forbidden),
        ("edm", "def f():\n    print('loss')", forbidden),
        ("run", "from pickle import loads", forbidden),
    ],
)
def test_each_check_notices_what_it_is_for(name: str, source: str, check: object) -> None:
    """Negative controls: one broken file beside the real ones."""
    assert callable(check)
    assert check({**modules(), name: ast.parse(source)})


def test_a_circle_is_noticed() -> None:
    broken = {**modules(), "edm": ast.parse("from dp_curriculum.sheets import image_sheet")}
    assert cycles(broken) == []
    broken["sheets"] = ast.parse("from dp_curriculum.edm import edm_loss")
    assert {"edm", "sheets"} <= set(cycles(broken))


def test_what_is_allowed_is_not_noticed() -> None:
    fine = {
        "sampling": ast.parse("from accelerate.utils import broadcast\nimport torch\nfrom dp_curriculum.edm import f")
    }
    assert not upward_imports(fine) and not misplaced_libraries(fine) and not forbidden(fine)
