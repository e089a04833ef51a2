"""The explorer in JupyterLab, in a real browser: sliders moved with the mouse and the keyboard, both themes."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
SCREENSHOTS = os.environ.get("DECOMP_SCREENSHOTS")
NEXT_CELL = 'print("handed on:", sum(p.numel() for p in explorer.model.parameters()), explorer.plan.params.after)'
WAIT = 90_000  # milliseconds: a machine may be busy

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium fonts-dejavu-core"),
]


@contextmanager
def jupyterlab(folder: Path):
    """A JupyterLab of its own on ``folder``, that touches no file of the user."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    own = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", "--ServerApp.allow_root=True", "--expose-app-in-browser"]
    command += [f"--ServerApp.root_dir={folder}"]
    log = (folder / "log").open("w")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | own | {"PYTHONPATH": paths}
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(f"{url}/api/status"), "JupyterLab to answer")
        yield url
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def until(condition, what: str, seconds: float = 90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


def answers(url: str):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def notebook(folder: Path) -> None:
    """The notebook of the explorer up to the explorer, on a network that is hardly trained, and a next cell."""
    found = json.loads((ROOT / "notebooks" / "choosing_ranks.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in found["cells"]]
    last = next(i for i, source in enumerate(sources) if "decomp.explore(" in source)
    found["cells"] = found["cells"][: last + 2]
    for cell, source in zip(found["cells"], sources, strict=False):
        cell["source"] = re.sub(r"epochs=\d+", "epochs=1", source)
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    blank = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    found["cells"][last + 1] = {**blank, "id": "next", "source": NEXT_CELL}
    (folder / "explorer.ipynb").write_text(json.dumps(found))


class Lab:
    """The page, and what a person would read and do there."""

    def __init__(self, page, url: str, folder: Path) -> None:
        self.page, self.url, self.folder = page, url, folder
        self.panel = page.locator(".decomp-explorer")
        self.cards = self.panel.locator(".decomp-cards").first
        self.status = self.panel.get_by_role("status")

    def open(self) -> None:
        self.page.goto(f"{self.url}/lab/tree/explorer.ipynb?reset")
        until(self.idle, "an idle kernel")

    def idle(self):
        sessions = answers(f"{self.url}/api/sessions") or []
        return sessions and all(
            s["kernel"]["connections"] and s["kernel"]["execution_state"] == "idle" for s in sessions
        )

    def command(self, name: str, **arguments) -> None:
        self.page.evaluate(
            "([name, given]) => { window.jupyterapp.commands.execute(name, given) }", [name, arguments]
        )

    def show(self, name: str) -> None:
        if SCREENSHOTS:
            self.panel.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))
            self.page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}-page.png"))

    def marker(self) -> str:
        return self.panel.locator("path.decomp-now").first.get_attribute("d")

    def says(self, text: str) -> None:
        self.status.filter(has_text=text).wait_for(timeout=WAIT)

    def drag(self, handle, pixels: int) -> None:
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + pixels / 2, y, steps=4)
        self.page.mouse.move(x + pixels, y, steps=4)
        self.page.mouse.up()

    def contrasts(self) -> list[float]:
        """Of every piece of text in the panel against the background of the page."""
        return self.page.evaluate(CONTRASTS)


CONTRASTS = """() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b }
  const behind = el => { for (; el; el = el.parentElement) { const c = getComputedStyle(el).backgroundColor;
    if (!/, 0\\)$|transparent/.test(c)) return c } return 'rgb(255, 255, 255)' }
  const texts = document.querySelectorAll(
    '.decomp-explorer b, .decomp-explorer small, .decomp-explorer text, .decomp-explorer label, ' +
    '.decomp-explorer .widget-readout')
  return [...texts].filter(el => el.textContent.trim()).map(el => { const style = getComputedStyle(el)
    const a = light(el.tagName == 'text' ? style.fill : style.color), b = light(behind(el))
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) })
}"""


def test_a_person_chooses_ranks_in_jupyterlab(tmp_path):
    from playwright.sync_api import sync_playwright

    notebook(tmp_path)
    with jupyterlab(tmp_path) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=OPTIONS)
        try:
            lab = Lab(browser.new_page(viewport={"width": 1400, "height": 1300}), url, tmp_path)
            lab.open()
            lab.command("notebook:run-all-cells")
            lab.panel.locator(".noUi-handle").first.wait_for(timeout=WAIT)
            six_layers_and_every_value_are_in_view(lab)
            sliders_move_the_numbers_and_the_plot(lab)
            buttons_hand_a_model_to_the_next_cell(lab)
            the_text_is_legible_in_the_dark(lab)
            a_restart_is_said_and_mended(lab)
            a_picture_and_a_table_stay_without_the_widgets(lab)
        except BaseException:
            lab.show("failed")
            raise
        finally:
            browser.close()


VISIBLE = """() => {
  const inside = el => { const box = el.getBoundingClientRect(), panel = document.querySelector('.decomp-explorer')
    .getBoundingClientRect(); return box.width > 0 && box.left >= panel.left - 1 && box.right <= panel.right + 1 }
  const bottom = document.querySelector('#jp-bottom-panel, .jp-StatusBar-Widget, #jp-main-statusbar')
  const end = bottom ? bottom.getBoundingClientRect().top : window.innerHeight
  const all = selector => [...document.querySelectorAll(selector)]
  return {
    tracks: all('.decomp-row .noUi-base').map(el => el.getBoundingClientRect().width),
    values: all('.decomp-row .widget-readout').map(el => inside(el) && el.scrollWidth <= el.clientWidth + 1
      && el.textContent.trim() != ''),
    rows: all('.decomp-row').filter(el => el.getBoundingClientRect().bottom <= end).length,
    wider: document.querySelector('.decomp-explorer').scrollWidth
      - document.querySelector('.decomp-explorer').clientWidth,
    filled: getComputedStyle(document.querySelector('.decomp-row .noUi-origin'), '::before').backgroundColor,
    beyond: all('.decomp-charts svg').filter(el => el.getBoundingClientRect().right
      > document.querySelector('.decomp-left').getBoundingClientRect().right + 1).length,
    idle: all('.decomp-idle').length,
    hovers: all('.decomp-explorer svg .decomp-hover title').length,
  } }"""


def six_layers_and_every_value_are_in_view(lab: Lab) -> None:
    """At the widths of a half window, of a laptop and of a screen."""
    for width, height, rows in ((900, 1300, 1), (1366, 768, 6), (1920, 1080, 8), (1400, 1300, 8)):
        lab.page.set_viewport_size({"width": width, "height": height})
        until(lambda width=width: lab.page.evaluate("() => window.innerWidth") == width, "the window")
        lab.panel.evaluate("panel => panel.scrollIntoView()")
        until(
            lambda rows=rows: lab.page.evaluate(VISIBLE)["rows"] >= rows, f"{rows} layers in view at {width}", 20
        )
        seen = lab.page.evaluate(VISIBLE)
        assert min(seen["tracks"]) >= 90, f"rank sliders at {width} pixels: {seen['tracks']}"
        assert seen["values"], "no values"
        assert all(seen["values"]), f"a value is cut off at {width} pixels"
        assert seen["wider"] <= 1, f"the panel has to be scrolled sideways at {width} pixels"
        assert seen["filled"] not in ("", "rgba(0, 0, 0, 0)")
        assert seen["idle"] == 1, "of budget and energy, the one that did not choose is grey"
        assert seen["hovers"] > 5
        assert not seen["beyond"], f"a chart reaches out of its column at {width} pixels"
        lab.show(f"width-{width}")


def sliders_move_the_numbers_and_the_plot(lab: Lab) -> None:
    before, marker = lab.cards.inner_text(), lab.marker()
    assert "MACs" in before
    handle = lab.panel.locator(".noUi-handle").first
    lab.drag(handle, -70)
    until(lambda: lab.cards.inner_text() != before and lab.marker() != marker, "the numbers and the plot")
    lab.says("Chosen by a budget of")
    before = lab.cards.inner_text()
    handle.focus()
    lab.page.keyboard.press("ArrowRight")
    until(lambda: lab.cards.inner_text() != before, "the arrow key")
    before = lab.cards.inner_text()
    row = lab.panel.locator(".decomp-row").nth(2)
    lab.drag(row.locator(".noUi-handle").first, -60)
    until(lambda: lab.cards.inner_text() != before, "the slider of a layer")
    until(lambda: row.locator("input[type=checkbox]").is_checked(), "the layer to be held")
    lab.show("light-moved")


def buttons_hand_a_model_to_the_next_cell(lab: Lab) -> None:
    lab.panel.get_by_role("button", name="Evaluate").click()
    lab.says("Evaluated at")
    assert lab.panel.locator("circle").count() >= 2
    lab.panel.get_by_role("button", name="Apply").click()
    lab.says("Applied")
    lab.show("light")
    lab.page.locator(".jp-CodeCell", has_text="handed on").locator(".jp-InputArea-editor").click()
    lab.page.keyboard.press("Control+Enter")

    def handed_on():
        found = re.search(r"handed on: (\d+) (\d+)", lab.page.locator(".jp-Notebook").inner_text())
        return found and found.group(1) == found.group(2)

    until(handed_on, "the next cell")


def the_text_is_legible_in_the_dark(lab: Lab) -> None:
    assert min(lab.contrasts()) > 4.4, "light theme"
    lab.command("apputils:change-theme", theme="JupyterLab Dark")
    until(lambda: lab.page.locator("body[data-jp-theme-light=false]").count(), "the dark theme")
    until(lambda: min(lab.contrasts()) > 4.4, "legible text in the dark theme", 10)
    lab.show("dark")


def a_restart_is_said_and_mended(lab: Lab) -> None:
    lab.command("kernelmenu:restart")
    lab.page.locator(".jp-Dialog .jp-mod-accept").click()
    lab.page.get_by_text("The kernel that drew this is gone").wait_for(timeout=WAIT)
    lab.show("restarted")
    lab.command("notebook:run-all-cells")
    lab.page.get_by_text("The kernel that drew this is gone").wait_for(state="hidden", timeout=WAIT)
    lab.panel.locator(".noUi-handle").first.wait_for(timeout=WAIT)
    before = lab.cards.inner_text()
    lab.drag(lab.panel.locator(".noUi-handle").first, -50)
    until(lambda: lab.cards.inner_text() != before, "the slider after the restart")


def a_picture_and_a_table_stay_without_the_widgets(lab: Lab) -> None:
    static = lab.page.locator("[id^=decomp-static]")
    assert static.count() == 1
    assert not static.is_visible(), "the widgets are there"
    lab.page.set_viewport_size({"width": 1366, "height": 1300})
    lab.command("docmanager:save")
    until(lambda: "decomp-static" in (lab.folder / "explorer.ipynb").read_text(), "the notebook to be saved")
    lab.page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")
    until(lambda: answers(f"{lab.url}/api/sessions") == [], "the kernel to end")
    lab.page.goto(f"{lab.url}/lab/tree/explorer.ipynb?reset")
    static.wait_for(timeout=WAIT)
    assert lab.panel.count() == 0, "no widgets without the kernel that had them"
    assert static.locator("img").count() == 2
    assert static.locator("tbody tr").count() > 5
    cut = (
        "table => [...table.querySelectorAll('td')].filter(cell => cell.scrollWidth > cell.clientWidth + 1).length"
    )
    assert static.locator("table").evaluate(cut) == 0, "nothing in the table is cut off"
    names = static.locator("tbody td:first-child").evaluate_all(
        "cells => cells.map(c => getComputedStyle(c).textAlign)"
    )
    assert set(names) <= {"left", "start"}
    order = "rows => rows.map(row => row.cells[0].textContent)"
    before = static.locator("tbody tr").evaluate_all(order)
    static.get_by_role("button", name="params").click()
    after = static.locator("tbody tr").evaluate_all(order)
    assert before != after, "a click on a heading sorts"
    assert sorted(before) == sorted(after)
    static.scroll_into_view_if_needed()
    if SCREENSHOTS:
        lab.page.screenshot(path=str(Path(SCREENSHOTS) / "static.png"))
