"""The rooms of the package: each imports rooms of lower floors, no file is in a circle, and each room uses the
libraries that are allowed there. All of it is read from the source; nothing is imported.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[2] / "src" / "dp_curriculum"
PACKAGE = "dp_curriculum"
MOST_FILES_AT_THE_TOP = 14

# From the ground up. A room is a folder, or a file at the top; rooms of one floor know nothing of each other.
FLOORS: tuple[set[str], ...] = (
    {"runtime"},
    {"privacy", "pipeline_dp_curriculum", "closed_form_prior"},
    {"config_sections"},
    {"config_history"},
    {"config"},
    {"data", "diffusion"},
    {"lessons", "dp_sgd"},
    {"evaluation"},
    {"runs"},
    {"sharing"},
    {"training"},
    {"audit"},
    {"commands"},
    {"accounting", "central_images", "edm", "ledger", "per_image_gradients"},  # doors: the public paths
    {"cli", "__init__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOORS = FLOORS[-2]

# Rooms in which a library may be used.
MODELS = {"lessons", "dp_sgd", "diffusion", "evaluation", "runs", "sharing", "training", "audit", "commands"}
SHIPPED = ("pipeline_dp_curriculum", "closed_form_prior")  # with models
LIBRARIES = {
    "torch": MODELS | {"runtime", "privacy", "data", *SHIPPED},
    "diffusers": MODELS | {*SHIPPED},
    "accelerate": {"runtime", "lessons", "dp_sgd", "evaluation", "training", "commands"},
    "safetensors": {"runtime", "runs", "sharing", "training", "audit"},
    "numpy": {"privacy", "data", "evaluation", "sharing", "audit"},
    "scipy": {"privacy", "lessons", "evaluation", "audit"},
    "dp_accounting": {"privacy", "audit"},
    "opacus": {"privacy", "dp_sgd"},
    "triton": {"dp_sgd"},
    "peft": {"diffusion"},  # an extra, imported where LoRA is asked for
    **dict.fromkeys(("cryptography", "filelock", "jsonschema"), {"privacy"}),
    "datasets": {"data", "sharing", "training", "audit"},
    "pyarrow": {"data", "sharing"},
    "PIL": {"data", "diffusion", "sharing", "audit"},
    "sklearn": {"data", "evaluation"},
    "transformers": {"evaluation", "commands"},
    "matplotlib": {"evaluation"},
    "tqdm": {"lessons", "evaluation", "training", "sharing", "commands"},
    "yaml": {"config", "sharing", "training"},
    "huggingface_hub": {"sharing"},
}
# Whoever imports these gets no torch: an accountant answers at once, and a decoding process starts without it.
WITHOUT_TORCH = ("accounting", "ledger", "privacy.verification", "config", "data.decoding", "cli", "__init__")
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
    names = (name.removeprefix(PACKAGE).lstrip(".") for name in imported(tree) if name.split(".")[0] == PACKAGE)
    # The longest name that is a file: "commands.sample.load_pipeline" is a function of "commands.sample".
    known = ([file for file in modules() if f"{name}.".startswith(f"{file}.")] for name in names)
    return {max(files, key=len, default="__init__") for files in known}


def library_imports(tree: ast.Module) -> set[str]:
    """Third-party libraries that a file imports."""
    tops = {name.split(".")[0] for name in imported(tree)}
    return tops - {PACKAGE, "__future__"} - set(sys.stdlib_module_names)


def room_of(name: str) -> str:
    return name.split(".")[0]


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node.lineno


def upward_imports(trees: dict[str, ast.Module]) -> list[str]:
    """Imports of another room that is not on a lower floor."""
    return [
        f"{name} imports {other}, which is not on a lower floor"
        for name, tree in trees.items()
        for other in sorted(own_imports(tree))
        if room_of(other) != room_of(name) and FLOOR[room_of(other)] >= FLOOR[room_of(name)]
    ]


def cycles(trees: dict[str, ast.Module]) -> list[str]:
    """What is left after files without imports among the rest were taken away, again and again."""
    graph = {name: own_imports(tree) & trees.keys() for name, tree in trees.items()}
    while free := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in free}
    return sorted(graph)


def misplaced_libraries(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{name} imports {library}, which is for {sorted(LIBRARIES.get(library, set()))}"
        for name, tree in trees.items()
        for library in sorted(library_imports(tree))
        if room_of(name) not in LIBRARIES.get(library, set())
    ]


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """What is imported when a file is: not within functions, nor for type checkers alone."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(ast.Module([node], []))


def reached_with_torch(name: str) -> list[str]:
    """Files that import torch, or a library that does, among those that are imported with this one."""
    seen, left = set(), {name}
    while left:
        seen.add(name := left.pop())
        at_once = ast.Module(
            [node for node in modules()[name].body if isinstance(node, (ast.Import, ast.ImportFrom))], []
        )
        parents = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)}
        left |= (own_imports(at_once) | parents) & modules().keys() - seen
    heavy = {"torch", "diffusers", "accelerate", "opacus", "transformers"}
    return sorted(other for other in seen if {n.split(".")[0] for n in imported_at_once(modules()[other])} & heavy)


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


def test_every_room_has_a_floor() -> None:
    assert {room_of(name) for name in modules()} == set(FLOOR), "give a new room its floor in FLOORS"
    assert sum(map(len, FLOORS)) == len(FLOOR), "one floor per room"
    assert len(list(SOURCE.glob("*.py"))) <= MOST_FILES_AT_THE_TOP, "a new file goes into a room"


def test_every_room_says_what_it_is_for() -> None:
    assert [name for name, tree in modules().items() if not ast.get_docstring(tree)] == []


def test_no_room_imports_a_higher_floor() -> None:
    assert upward_imports(modules()) == []


def test_doors_are_for_those_outside() -> None:
    assert [name for name, tree in modules().items() if own_imports(tree) & DOORS] == []


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_has_no_use_for_torch_loads_none(name: str) -> None:
    assert reached_with_torch(name) == []


def test_torch_is_noticed_at_a_distance() -> None:
    assert reached_with_torch("edm") == ["closed_form_prior", "diffusion.edm", "pipeline_dp_curriculum"]


def test_no_files_import_each_other_in_a_circle() -> None:
    assert cycles(modules()) == []


def test_each_library_is_used_in_its_rooms() -> None:
    assert misplaced_libraries(modules()) == []


def test_what_is_shipped_imports_torch_and_diffusers_alone() -> None:
    for name in SHIPPED:
        tree = modules()[name]
        assert library_imports(tree) <= {"torch", "diffusers"}
        assert own_imports(tree) == set()


def test_no_pickle_no_global_seed_and_no_print() -> None:
    assert forbidden(modules()) == []


@pytest.mark.parametrize(
    ("name", "source", "check"),
    [
        ("diffusion.edm", "from dp_curriculum.cli import main", upward_imports),
        ("diffusion.edm", "def f():\n    import dp_curriculum.training.run", upward_imports),
        ("config", "from dp_curriculum.training import plan", upward_imports),
        ("sharing.markdown", "import sklearn", misplaced_libraries),
        ("config", "from torch.nn import functional", misplaced_libraries),
        ("data.images", "from accelerate import Accelerator", misplaced_libraries),
        ("diffusion.edm", "import transformers", misplaced_libraries),
        ("cli", "import requests", misplaced_libraries),
        ("training.run", "import torch\ntorch.load('x')", forbidden),
        ("training.run", "from accelerate.utils import set_seed\nset_seed(0)", forbidden),
        ("data", "import numpy as np\nnp.random.seed(0)", forbidden),
        ("diffusion.edm", "def f():\n    print('loss')", forbidden),
        ("training.run", "from pickle import loads", forbidden),
    ],
)
def test_each_check_notices_what_it_is_for(name: str, source: str, check: object) -> None:
    """Negative controls: one broken file beside the real ones."""
    assert callable(check)
    assert check({**modules(), name: ast.parse(source)})


def test_a_circle_is_noticed() -> None:
    broken = {**modules(), "diffusion.edm": ast.parse("from dp_curriculum.diffusion.sheets import image_sheet")}
    assert cycles(broken) == []
    broken["diffusion.sheets"] = ast.parse("from dp_curriculum.diffusion.edm import edm_loss")
    assert {"diffusion.edm", "diffusion.sheets"} <= set(cycles(broken))


def test_what_is_allowed_is_not_noticed() -> None:
    fine = {
        "dp_sgd.sampling": ast.parse(
            "from accelerate.utils import broadcast\nimport torch\nfrom dp_curriculum.diffusion.edm import f"
        )
    }
    assert not upward_imports(fine) and not misplaced_libraries(fine) and not forbidden(fine)
