"""The notebook of the examples runs to its end, and its files are as small as a repository wants them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_model.ipynb"
SOURCE = ROOT / "src"
ENDLESS = """
from dp_curriculum import CurriculumConfig, run_curriculum
options = {"resolution": 8, "stages": ["dp_sgd"], "block_out_channels": [8], "num_inference_steps": 2}
config = CurriculumConfig().replace(num_dp_steps=100_000, expected_batch_size=16, target_epsilon=1000, **options)
result = run_curriculum(config, output_dir="out")
print("result.finished is", result.finished)
"""
HAS_KERNEL = all(importlib.util.find_spec(name) is not None for name in ("nbclient", "ipykernel"))


def cells(kind: str) -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **variables}


def test_it_is_stored_without_output() -> None:
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.skipif(HAS_KERNEL, reason="it runs in a kernel")
def test_its_code_runs(tmp_path: Path) -> None:
    program = "\n".join(cells("code"))
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "accuracy: " in run.stdout and (tmp_path / "out" / "first_model" / "README.md").exists()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_KERNEL, reason="nbclient or ipykernel is not installed")
def test_it_runs_in_a_kernel_and_shows_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    kernel = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    folder = tmp_path / "jupyter" / "kernels" / "this"  # the kernel of this very Python, whatever else is installed
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps({**kernel, "display_name": "this"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="this", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert any("data:image/png;base64," in page and "differentially private" in page for page in pages)
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert any("accuracy: " in output.get("text", "") for output in shown)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_KERNEL, reason="nbclient or ipykernel is not installed")
def test_an_interrupt_in_a_notebook_ends_the_run_with_a_card_and_keeps_the_kernel(tmp_path: Path) -> None:
    from jupyter_client.manager import KernelManager

    manager = KernelManager()  # of this very Python, which is jupyter_client's own kernel
    manager.start_kernel(env=environment(), cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        client.execute(ENDLESS)
        said = ""
        while "2/100000" not in said:  # noisy steps
            message = client.get_iopub_msg(timeout=120)
            said += message["content"].get("text", "") + str(message["content"].get("traceback", ""))
            assert message["msg_type"] != "error", said
        manager.interrupt_kernel()
        while "result.finished is" not in said:
            message = client.get_iopub_msg(timeout=120)
            said += message["content"].get("text", "")
            assert message["msg_type"] != "error", said
        assert "result.finished is False" in said and "Finishing the noisy step, then saving" in said, said
        assert "differential" in (tmp_path / "out" / "README.md").read_text()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
