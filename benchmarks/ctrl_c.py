"""What Ctrl-C does to a small run, at each moment and under each launcher, on a real terminal.

    python benchmarks/ctrl_c.py --output benchmarks/results/ctrl_c.json
    python benchmarks/ctrl_c.py --launchers torchrun --moments card

A run waits at a moment until Ctrl-C has been typed. Measured are the seconds until the first line, the status that a
shell sees, whether the card holds (`verify --local_run`), and what is last on the screen. A stop before anything is
spent leaves no card: then there must be no charge either.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dp_curriculum.cli import main as dp_curriculum
from dp_curriculum.privacy.ledger import PrivacyLedger


# Where a run waits: the function that is about to be called, as "module:name".
MOMENTS = {
    "imports": "",
    "reading": "dp_curriculum.training.validation:read_images",
    "gradient check": "dp_curriculum.training.curriculum:check_gradients",
    "rehearsal": "dp_curriculum.training.rehearsal:write_release",
    "query": "dp_curriculum.training.teaching:_save_tensors",
    "pretraining": "dp_curriculum.lessons.pretraining:_loss",
    "sheet of a lesson": "dp_curriculum.training.run:save_sheet",
    "noisy step": "dp_curriculum.dp_sgd.trainer:physical_batches",
    "checkpoint": "dp_curriculum.training.stages:save_checkpoint",
    "card": "dp_curriculum.training.finishing:release_card",
    "sample sheet": "dp_curriculum.training.finishing:save_note",
}
BEFORE_SPENDING = ("imports", "reading", "gradient check", "rehearsal")
_BIN = Path(sys.executable).parent
LAUNCHERS = {
    "train": [sys.executable],
    "accelerate launch": [
        str(_BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ],
    "torchrun": [str(_BIN / "torchrun"), "--standalone", "--nproc_per_node", "1"],
}  # fmt: skip
# `torchrun` ends with status 1 after any signal, whatever the status of the run was.
STATUS = {"torchrun": 1}
FIRST_LINES = ("Stopping: ", "Finishing ", "Saving")
LAST_WORDS = ("dp-curriculum: ", "interrupted: ")
OPTIONS = {
    "resolution": 8, "block_out_channels": 8, "stages": "mean dp_sgd", "pretrain_steps": 8, "pretrain_batch_size": 8,
    "num_dp_steps": 4, "expected_batch_size": 16, "checkpointing_steps": 2, "lesson_noise_multiplier": 20,
    "num_inference_steps": 2,
}  # fmt: skip

# The run: it stops before a call and waits for a file. At "imports" it waits inside the import of a library.
_SCRIPT = """
import importlib, importlib.abc, os, sys, time
here, target = sys.argv[1:3]

def wait():
    if not os.path.exists(here + "/here"):
        open(here + "/here", "w").close()
        while not os.path.exists(here + "/go"):
            time.sleep(0.02)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "diffusers":
            wait()

if not target:
    sys.meta_path.insert(0, Finder())
else:
    module, name = target.split(":")
    module = importlib.import_module(module)
    before, calls = getattr(module, name), []
    def waiting(*given, **options):
        calls.append(name)
        # The sheet of a lesson is one of several, and the first card is that of the rehearsal.
        if (name != "save_sheet" or "after-" in str(given[1])) and (name != "release_card" or len(calls) == 2):
            wait()
        return before(*given, **options)
    setattr(module, name, waiting)
    if name == "save_note":  # in the place of the sheet at the end
        run = importlib.import_module("dp_curriculum.training.run")
        draw = run.Run._draw_samples
        def drawing(self, unet, path):
            if path.name == "samples.png":
                wait()
            return draw(self, unet, path)
        run.Run._draw_samples = drawing
from dp_curriculum.cli import main
sys.exit(main(["train", *sys.argv[3:]]))
"""
# In the place of the shell: it owns the terminal, starts the command, and outlives Ctrl-C.
_SHELL = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, lambda *given: None)
status = subprocess.Popen(sys.argv[2:]).wait()
open(sys.argv[1] + "/status.new", "w").write(str(status if status >= 0 else 128 - status))
os.rename(sys.argv[1] + "/status.new", sys.argv[1] + "/status")
while not os.path.exists(sys.argv[1] + "/end"):
    time.sleep(0.02)
"""


@dataclass(frozen=True)
class Stopped:
    """What one Ctrl-C did."""

    launcher: str
    moment: str
    first_line_seconds: float
    first_line: str
    status: int
    saved_after_seconds: float
    has_card: bool
    card_holds: bool
    charged_steps: int
    last_line: str

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        expected = STATUS.get(self.launcher, 130)
        checks = {
            f"the first line came after {self.first_line_seconds:.2f} s": self.first_line_seconds < 1,
            f"status {self.status}, not {expected}": self.status == expected,
            "the card does not hold": self.card_holds,
            f"a card: {self.has_card}": self.has_card is (self.moment not in BEFORE_SPENDING),
            "steps are charged without a card": self.has_card or self.charged_steps == 0,
            f"last on the screen: {self.last_line!r}": self.last_line.startswith((*LAST_WORDS, "  ")),
        }
        return [f"{self.launcher}, {self.moment}: {fault}" for fault, is_fine in checks.items() if not is_fine]


class Terminal:
    """A terminal, what is shown on it, and a command that runs in it."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], folder: Path) -> None:
        self._main, other = pty.openpty()
        self.shown = ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SHELL, str(folder), *command],
            stdin=other, stdout=other, stderr=other, env={**os.environ, **environment}, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(other)

    def read(self, seconds: float) -> None:
        """Reads what appears within a while."""
        if select.select([self._main], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self.shown += os.read(self._main, 65536).decode("utf-8", "replace")

    def read_until(self, is_there: object, limit: float) -> None:
        """Reads until a condition holds."""
        assert callable(is_there)
        until = time.monotonic() + limit
        while not is_there():
            if time.monotonic() > until:
                raise TimeoutError(self.shown[-3000:])
            self.read(0.02)

    def type(self, keys: bytes) -> None:
        os.write(self._main, keys)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._main)


def lines(shown: str) -> list[str]:
    """What is left on the screen, line by line, bars by their last state."""
    kept = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in shown.split("\n")]
    return [line for line in kept if line.strip()]


def stop_at(moment: str, launcher: str, folder: Path, *, limit: float = 240) -> Stopped:
    """Starts a run, types Ctrl-C at a moment, and looks at what it leaves."""
    script, out = folder / "run.py", folder / "out"
    script.write_text(_SCRIPT)
    options = [f"--{name} {value}" for name, value in OPTIONS.items()]
    arguments = [str(folder), MOMENTS[moment], *" ".join(options).split(), "--output_dir", str(out)]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    terminal = Terminal([*LAUNCHERS[launcher], str(script), *arguments], environment, folder)
    try:
        terminal.read_until((folder / "here").exists, limit)
        terminal.read(0.1)
        before = len(terminal.shown)
        start = time.monotonic()
        terminal.type(b"\x03")
        terminal.read_until(lambda: first_line(terminal.shown[before:]) is not None, 30)
        first_seconds = time.monotonic() - start
        (folder / "go").touch()
        terminal.read_until((folder / "status").exists, limit)
        terminal.read_until(lambda: any(f"\n{words}" in terminal.shown[before:] for words in LAST_WORDS), 30)
        saved_seconds = time.monotonic() - start
        for _ in range(5):
            terminal.read(0.2)
        (folder / "end").touch()
    finally:
        terminal.close()
    has_card = (out / "README.md").exists()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        holds = not has_card or dp_curriculum(["verify", str(out), "--local_run"]) == 0
    return Stopped(
        launcher, moment, round(first_seconds, 3), first_line(terminal.shown[before:]) or "",
        int((folder / "status").read_text()), round(saved_seconds, 1), has_card, holds, charged_steps(out),
        lines(terminal.shown)[-1][:200],
    )  # fmt: skip


def first_line(shown: str) -> str | None:
    """The line that answers Ctrl-C, whole."""
    found = (line.rstrip("\r") for line in shown.split("\n")[:-1] if line.startswith(FIRST_LINES))
    return next(found, None)


def charged_steps(out: Path) -> int:
    """Steps in the ledger of a run, if there is one."""
    path = out / "run" / "privacy_ledger.jsonl"
    if not path.exists():
        return 0
    with PrivacyLedger.open(path) as ledger:
        return sum(event.num_steps for event in ledger.events)


def sweep(launchers: Sequence[str], moments: Sequence[str]) -> Iterator[Stopped]:
    """Each moment under each launcher."""
    for launcher in launchers:
        for moment in moments:
            with tempfile.TemporaryDirectory() as folder:
                yield stop_at(moment, launcher, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=LAUNCHERS)
    parser.add_argument("--moments", nargs="+", default=list(MOMENTS), choices=MOMENTS)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found, faults = [], []
    for stopped in sweep(given.launchers, given.moments):
        found.append(asdict(stopped))
        faults += stopped.faults
        cell = f"{stopped.launcher:<18} {stopped.moment:<18} {stopped.first_line_seconds:.2f} s"
        print(f"{cell}  status {stopped.status}  card {stopped.has_card}  {stopped.first_line}", flush=True)
        for fault in stopped.faults:
            print(f"  FAULT {fault}", flush=True)
        if given.output is not None:
            given.output.write_text(json.dumps({"stopped": found, "faults": faults}, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
