"""A real JupyterLab in a real browser, as `make lab` starts it: `make test-lab`.

Every notebook is run from a copy of this checkout, with all folds opened, saved and checked.
"""

import json
import os
import re
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

import pytest

from tools.notebooks import ROOT, find_chapters

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
TOKEN = "lab"
SECONDS = 300  # for one notebook to run

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on the path")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git tracks, or would, in a folder of its own, committed there."""
    folder = tmp_path_factory.mktemp("book")
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(git, check=True, capture_output=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def lab_options() -> list[str]:
    """The options of the Makefile's own command."""
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "lab"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
        check=True,
        capture_output=True,
        text=True,
    )
    command = done.stdout.splitlines()[-1].split()
    return command[command.index("lab") + 1 :]


@pytest.fixture(scope="module")
def lab(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running JupyterLab, on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")}
    environment |= {"HOME": str(home), "PYTHONPATH": str(checkout)}
    log = (home / "lab.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", *lab_options(), "--no-browser", "--ip=127.0.0.1",
         f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
         "--expose-app-in-browser"],
        cwd=checkout, env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (home / "lab.log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(60)  # it ends its kernels first
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    yield opened
    context.close()


def open_notebook(page: Any, lab: str, name: str) -> list[str]:
    """Open a notebook; returns the list that the browser's console errors will go to."""
    errors: list[str] = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{lab}/lab/workspaces/{name}/tree/notebooks/{name}.ipynb?token={TOKEN}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(
        "() => { const w = window.jupyterapp?.shell.currentWidget;"
        " return w?.sessionContext?.session?.kernel?.status === 'idle'; }"
    )
    return errors


def run(page: Any, command: str) -> None:
    page.evaluate("command => window.jupyterapp.commands.execute(command)", command)


def stored_errors(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [o["evalue"] for o in outputs if o["output_type"] == "error"]


@pytest.mark.parametrize("stem", [chapter.stem for chapter in find_chapters(ROOT)])
def test_a_notebook_runs_is_saved_and_still_passes_the_check(page, lab, checkout, stem):
    page.set_default_timeout(SECONDS * 1000)
    errors = open_notebook(page, lab, stem)
    assert page.locator(".jp-Dialog, .Toastify__toast").count() == 0, "a pop-up on opening"
    run(page, "notebook:show-all-cell-code")
    run(page, "notebook:run-all-cells")
    run(page, "docmanager:save")
    path = checkout / "notebooks" / f"{stem}.ipynb"
    assert stored_errors(path) == []
    assert "language_info" in path.read_text()
    broken = page.evaluate(
        "() => [...document.querySelectorAll('.jp-Cell img')]"
        ".filter(i => i.complete && i.naturalWidth === 0).map(i => i.src)"
    )
    assert broken == []
    assert page.locator(".jp-Dialog").count() == 0
    assert [line for line in errors if not re.search("favicon", line)] == []
    run(page, "kernelmenu:shutdown")
    checked = subprocess.run(
        [sys.executable, "-m", "tools.check"], cwd=checkout, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def moving(page, lab, stem, name):
    """Run a notebook; returns the figure of that label, its spoken line, the console's errors."""
    page.set_default_timeout(SECONDS * 1000)
    errors = open_notebook(page, lab, stem)
    assert page.locator(".jp-OutputArea img").count() > 0
    figure = page.get_by_role("group", name=name)
    assert figure.count() == page.get_by_text("model not found").count() == 0
    run(page, "notebook:run-all-cells")
    figure.wait_for()
    figure.scroll_into_view_if_needed()
    return figure, sync_api.expect(figure.get_by_role("status")), errors


def test_the_convolution_answers_back(page, lab):
    figure, told, errors = moving(
        page, lab, "01_formulation", "A convolution, one output at a time"
    )
    told.to_have_text(re.compile(r"18·1 = 108\.$"))
    figure.get_by_role("button", name="output channel 0, row 0, column 0: 12").hover()
    told.to_have_text(re.compile(r"0·1 \+ 1·1 \+ 5·1 \+ 6·1 = 12\. Outside"))
    for key, row in (("ArrowDown", 1), ("ArrowUp", 0), ("ArrowUp", 0)):
        figure.locator('[aria-selected="true"] button').focus()
        page.keyboard.press(key)
        told.to_have_text(re.compile(f"^Output channel 0, row {row}, column 0: "))
    before = figure.screenshot()
    figure.get_by_label("stride").select_option("2")
    assert figure.get_by_role("gridcell").count() == 2 * 3 * 3
    assert figure.screenshot() != before
    figure.get_by_label("layer").press("ArrowUp")  # Lab would move its own cursor
    figure.get_by_label("layer").press("ArrowUp")
    assert figure.get_by_label("kernel, channel 1").is_disabled()
    figure.get_by_role("button", name="next output").click()
    told.to_have_text(re.compile("^Output channel 0, row 0, column 1: "))
    assert errors == []
    run(page, "kernelmenu:shutdown")


def test_the_mix_answers_back(page, lab):
    name = "A mix of kernels, split three ways"
    figure, told, errors = moving(page, lab, "02_partitioning", name)
    told.to_have_text(re.compile(r"^Weights: equal 1,312, .* sees 9×9 pixels at most\.$"))
    before = figure.screenshot()
    figure.get_by_label("13", exact=True).check()
    figure.get_by_label("layers").select_option("2")
    told.to_have_text(re.compile(r", 13×13 only 5,408\. 2 layers see 25×25 pixels at most\.$"))
    assert figure.screenshot() != before
    figure.get_by_label("channels").fill("7")
    told.to_have_text(re.compile("exponential leaves a group empty"))
    figure.get_by_label("channels").press("ArrowRight")
    sliced = figure.get_by_role("row", name="equal").get_by_role("img")
    sync_api.expect(sliced).to_have_attribute("aria-label", re.compile("^4 of 3 by 3, 1 of 5 by 5"))
    for k in (3, 5, 7, 9):
        figure.get_by_label(str(k), exact=True).uncheck()
    figure.get_by_label("13", exact=True).click()
    assert figure.get_by_label("13", exact=True).is_checked()  # the last one stays
    assert errors == []
    run(page, "kernelmenu:shutdown")


def test_the_blocks_answer_back(page, lab):
    figure, told, errors = moving(page, lab, "07_mixnet", "The blocks of a MixNet, one by one")
    told.to_have_text(re.compile("^Block 0 of MixNet-S: 16 → 16 channels, 112×112 → 112×112"))
    before = figure.screenshot()
    figure.get_by_role("button", name="block 9, kernels 3, 5").press("Enter")  # Lab would edit
    told.to_have_text(re.compile("^Block 9 of MixNet-S: 80 → 80 channels"))
    assert figure.get_by_role("button", pressed=True).count() == 1
    assert figure.screenshot() != before
    figure.get_by_label("MixNet", exact=True).select_option("L")
    figure.get_by_role("button", name="block 18").click()
    told.to_have_text(re.compile(r"^Block 18 of MixNet-L: 264 → 264 .* adds its input; "))
    figure.get_by_label("MixNet", exact=True).select_option("S")
    told.to_have_text(re.compile("^Block 15 of MixNet-S: 200 → 200 channels, 7×7"))
    assert figure.get_by_role("row").count() == 1 + 8 + 1
    assert errors == []
    run(page, "kernelmenu:shutdown")
