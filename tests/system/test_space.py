"""The Space in a real browser: a person chooses a class, gets images and reads what is protected.

Without gradio, playwright or a browser the test is skipped, unless REQUIRE_BROWSER is set, as CI does.
`SPACE_SCREENSHOT=FILE` keeps the picture.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dp_curriculum.sharing.export import export_release


APP = Path(__file__).parents[2] / "examples" / "space" / "app.py"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if BROWSER else ["a browser"]
SECONDS = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) and not os.environ.get("REQUIRE_BROWSER"), reason=f"not installed: {', '.join(MISSING)}"
    ),
]


@pytest.fixture(scope="module")
def model(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "model"
    export_release(finished_run, folder, repo_id="org/faces")
    return folder


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app, served by a process of its own until the tests are over."""
    assert not MISSING, f"not installed: {', '.join(MISSING)}; `make browser` installs it"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "app.log"
    environment = {**os.environ, "MODEL_ID": str(model), "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "127.0.0.1,localhost"}
    with log.open("wb") as output:
        app = subprocess.Popen([sys.executable, str(APP)], env=environment, stdout=output, stderr=output)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
        while not _answers(url):
            assert app.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield url
    finally:
        app.terminate()
        app.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # --no-sandbox: in a container the browser runs as root. No other address than the app's is let through.
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1100})
        page.set_default_timeout(SECONDS * 1000)
        page.route("**/*", lambda route: route.continue_() if address in route.request.url else route.abort())
        page.goto(address)
        yield page
        browser.close()


def test_a_person_chooses_a_class_and_sees_images_and_what_is_protected(
    page: Any, model: Path, tmp_path: Path
) -> None:
    choice = page.get_by_role("combobox", name="Class")
    choice.click()
    assert page.title() == "Images under differential privacy"
    choice.fill("7")
    choice.press("Enter")
    page.get_by_role("button", name="Generate").click()
    pictures = page.locator(".grid-wrap img")
    pictures.nth(7).wait_for(state="visible")
    assert pictures.count() == 8
    # An element is visible before its file is there: `decode` waits for it, and fails where there is no image.
    width = pictures.first.evaluate("image => image.decode().then(() => image.naturalWidth)")
    assert width == 160, "8 pixels, enlarged by a whole factor"
    statement = json.loads((model / "privacy.json").read_text())["statement"]
    shown = page.locator("#privacy").inner_text()
    assert statement.split(";")[0] in shown and "Smaller is more private" in shown and "Not covered" in shown
    screenshot = Path(os.environ.get("SPACE_SCREENSHOT", tmp_path / "space.png"))
    page.screenshot(path=screenshot)
    with Image.open(screenshot) as picture:
        assert picture.size == (1200, 1100) and np.asarray(picture.convert("L")).std() > 10


def test_the_programming_interface_is_held_to_the_limits_of_the_page(address: str, page: Any) -> None:
    """One who does not use the sliders gets no more than one who does."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    assert len(client.predict("3", 2, 1, 1, -5, api_name="/generate")) == 2
    for count, steps, guidance in ((10_000, 1, 1), (1, 10_000, 1), (1, 1, 1e9), (0, 1, 1), (1, 0, 1)):
        with pytest.raises(AppError):
            client.predict("3", count, steps, guidance, 0, api_name="/generate")
