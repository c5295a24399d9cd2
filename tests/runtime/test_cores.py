"""Whose word counts on cores and threads: affinity, control groups, the launcher, the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dp_curriculum.runtime import cores
from dp_curriculum.runtime.cores import processes_here, share_of_cores, threads_of_user, usable_cores, wait_asleep


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "max 100000\n"}, 4),
        ("0::/not/mounted\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "odd\n"}, 8),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "20000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("nonsense\n", {}, 8),
    ],
)
def test_a_container_may_keep_fewer_cores_busy(
    group: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    inside = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert usable_cores(write(tmp_path, {"proc/self/cgroup": group, **inside})) == expected


@pytest.mark.parametrize(("beside", "expected"), [("1", 8), ("2", 4), ("3", 2), ("9", 1), ("", 8), ("x", 8), ("0", 8)])
def test_processes_of_a_launch_share_the_cores(beside: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_quotas", lambda system: iter(()))
    assert share_of_cores({"LOCAL_WORLD_SIZE": beside}) == expected
    assert processes_here({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}) == 3


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


def launcher(root: Path, *arguments: str, **variables: str) -> Path:
    environ = "".join(f"{name}={value}\0" for name, value in {"HOME": "/", **variables}.items())
    place = f"proc/{os.getppid()}"
    return write(root, {f"{place}/environ": environ, f"{place}/cmdline": "\0".join(("python", *arguments))})


@pytest.mark.parametrize("value", ["", "0", "-1", "many"])
def test_what_is_no_number_of_threads_is_not_heard(value: str) -> None:
    assert threads_of_user({"OMP_NUM_THREADS": value}) is None
    assert threads_of_user({}) is None


def test_without_a_launcher_the_variable_is_the_users() -> None:
    assert threads_of_user({"OMP_NUM_THREADS": "1"}) == 1
    assert threads_of_user({"OMP_NUM_THREADS": "3,2"}) == 3


@pytest.mark.parametrize("launched", [ACCELERATE, TORCHRUN])
def test_what_a_launcher_sets_by_itself_is_not_the_users(launched: dict[str, str], tmp_path: Path) -> None:
    silent = launcher(tmp_path / "silent", "train.py")
    told = launcher(tmp_path / "told", "train.py", OMP_NUM_THREADS="1")
    asked = launcher(tmp_path / "asked", "--num_cpu_threads_per_process=1", "train.py")
    one, four = ({"OMP_NUM_THREADS": count, **launched} for count in ("1", "4"))
    assert threads_of_user(one, silent) is None
    assert threads_of_user(four, silent) is None, "cores of the machine, not of the container"
    assert threads_of_user(one, told) == threads_of_user(one, asked) == 1
    # Where the launcher cannot be seen, as on macOS:
    assert threads_of_user(one, tmp_path) is None and threads_of_user(four, tmp_path) == 4


def test_threads_wait_asleep_unless_the_user_says_how() -> None:
    for given, expected in (
        ({}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
    ):
        environment = dict(given)
        wait_asleep(environment)
        assert environment == expected


def test_a_command_says_so_before_openmp_is_loaded() -> None:
    script = (
        "import os, sys, importlib\n"
        "from dp_curriculum import cli\n"
        "def asked(name):\n"
        "    assert 'torch' not in sys.modules\n"
        "    print(os.environ['OMP_WAIT_POLICY'])\n"
        "    raise ValueError\n"
        "importlib.import_module = asked\n"
        "cli.main(['sample'])\n"
    )
    said = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in said}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout == "passive\n", done.stderr


def threads_under(tmp_path: Path, launcher: list[str], **variables: str) -> list[str]:
    """What each process of a real launch says of its threads and its share of the cores."""
    script = tmp_path / "script.py"
    script.write_text(
        "from dp_curriculum.runtime.cores import processes_here, threads_of_user\n"
        "print(f'{threads_of_user()} of the user, {processes_here()} here\\n', end='', flush=True)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", *launcher, str(script)]
    done = subprocess.run(command, env={**clean, **variables}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


LAUNCH = ["accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--dynamo_backend=no"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the variables of another process are seen on Linux alone")
@pytest.mark.parametrize(
    ("options", "variables", "expected"),
    [
        ([], {}, "None of the user, 1 here"),
        ([], {"OMP_NUM_THREADS": "1"}, "1 of the user, 1 here"),
        (["--num_cpu_threads_per_process=1"], {}, "1 of the user, 1 here"),
    ],
)
def test_accelerate_launch_does_not_decide_on_the_threads(
    options: list[str], variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    launcher = [*LAUNCH, "--mixed_precision=no", *options]
    assert threads_under(tmp_path, launcher, **variables) == [expected]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the variables of another process are seen on Linux alone")
def test_processes_of_torchrun_share_the_cores(tmp_path: Path) -> None:
    said = threads_under(tmp_path, ["torch.distributed.run", "--nproc_per_node=2", "--master_port=0"])
    assert said == ["None of the user, 2 here"] * 2
