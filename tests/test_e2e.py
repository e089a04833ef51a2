"""In a real browser: the explorer in JupyterLab, by mouse and keyboard, in both themes; the report; the site."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import torch

import decomp
from decomp.digits import DigitNet

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
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:  # a machine with more to do
            server.kill()
            server.wait()
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


@contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


def test_a_person_chooses_ranks_in_jupyterlab(tmp_path):
    notebook(tmp_path)
    with jupyterlab(tmp_path) as url, chromium() as browser:
        lab = Lab(browser.new_page(viewport={"width": 1400, "height": 1300}), url, tmp_path)
        try:
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
    hovers: all('.decomp-explorer svg .decomp-hover title').map(el => el.textContent),
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
        assert len(seen["hovers"]) > 5
        assert all(re.search(r"\d", text) for text in seen["hovers"]), "values under the mouse"
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


def under_the_mouse(page, part) -> str:
    """The text of the tooltip that a browser shows for what is under the mouse in the middle of an element."""
    part.scroll_into_view_if_needed()
    box = part.bounding_box()
    return page.evaluate(
        "([x, y]) => { for (let el = document.elementFromPoint(x, y); el; el = el.parentElement) {"
        " const title = el.querySelector(':scope > title'); if (title) return title.textContent } return '' }",
        [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2],
    )


def test_a_colleague_reads_the_report(tmp_path):
    torch.manual_seed(0)
    dense, x = DigitNet().eval(), torch.randn(2, 1, 8, 8)
    small = decomp.compress(dense, x, macs=0.5)
    path = decomp.report(small, dense, x, path=tmp_path / "report.html")
    with chromium() as browser:
        for width, theme in ((900, "light"), (1366, "dark"), (1920, "light")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
            requests, errors = [], []
            page.on("request", lambda request, requests=requests: requests.append(request.url))
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto(path.as_uri())
            assert requests == [path.as_uri()], "the report asks for something from elsewhere"
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "scrolled sideways"
            table = page.locator(".decomp-table").first
            cells = "rows => rows.map(row => row.cells[4].textContent)"
            before = table.locator("tbody tr").evaluate_all(cells)
            table.get_by_role("button", name="params").click()
            after = table.locator("tbody tr").evaluate_all(cells)
            assert sorted(before) == sorted(after)
            assert after != before, "a click on a heading sorts"
            bar = (
                page.get_by_role("img", name="errors of the replaced layers").locator("g:has(> title) path").first
            )
            assert re.match(r"layer\d\.\S+: error \d\.\d+  ranks", under_the_mouse(page, bar))
            point = page.get_by_role("img", name="spectrum of").first.locator("use:has(> title)").first
            assert re.match(r"component 1: \d", under_the_mouse(page, point))
            light = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
            assert light == page.evaluate("getComputedStyle(document.body).color"), (
                "figures have the page's colour"
            )
            with page.expect_download() as download:
                page.get_by_role("link", name="plan.json").click()
            assert decomp.Plan.from_json(download.value.path().read_text()).keys() == small.decomp_plan.keys()
            assert not errors


class Links(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.targets += [given[name] for name in ("href", "src") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as .ci/run has built it, else built here."""
    if os.environ.get("DECOMP_SITE"):
        return Path(os.environ["DECOMP_SITE"])
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(target / "trees")]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    run = subprocess.run(
        [*command, str(ROOT / "docs"), str(target / "html")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return target / "html"


def test_no_link_of_the_site_is_broken(site):
    pages = {path.resolve(): Links(path) for path in site.rglob("*.html")}
    assert len(pages) > 40
    broken = []
    for page, links in pages.items():
        for link in links.targets:
            if re.match(r"\w+:", link):
                continue
            name, anchor = urldefrag(unquote(link))
            target = (page.parent / name.split("?")[0]).resolve() if name else page
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{page.name}: {link}")
    assert not broken


@contextmanager
def served(folder: Path):
    """The folder on a port of its own: over file: a browser refuses the excerpts of a search."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def test_a_reader_searches_the_site(site):
    found = {}
    with served(site) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        requests, errors = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for words in ("sequential", "OutOfReach", "kronecker", "load saved model"):
            page.goto(f"{url}index.html")
            box = page.get_by_role("searchbox").or_(page.get_by_placeholder("Search")).first
            box.fill(words)
            box.press("Enter")
            page.locator("#search-results li a").first.wait_for(timeout=WAIT)
            page.wait_for_function(
                "() => /found \\d+ page/.test(document.querySelector('#search-results').innerText)"
            )
            found[words] = page.locator("#search-results li > a").all_inner_texts()
        page.locator("#search-results li > a").first.click()
        assert page.get_by_role("heading", level=1).count() == 1
        for width, name in ((900, "start"), (1366, "methods/tucker"), (1920, "api/compressing")):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(f"{url}{name}.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is scrolled sideways"
    assert any("Recovering accuracy" in title for title in found["sequential"])
    assert any("OutOfReach" in title for title in found["OutOfReach"])
    assert "kronecker" in found["kronecker"][0]
    assert any("Saving and loading" in title for title in found["load saved model"])
    assert not [each for each in requests if not each.startswith((url, "data:"))], (
        "asks for something from elsewhere"
    )
    assert not errors
