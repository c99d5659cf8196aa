"""report.html and inspect's page in a real browser: wide and narrow, light and dark, without a network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import command

from fastchat_qlora.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium not found; apt-get install chromium")

VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
NASTY = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)> \u202e\x07 {{ 7 * 7 }}"

# WCAG 2.2: relative luminance and contrast of every text with its background; small text needs 4.5.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parse = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return Array.from(canvas.getImageData(0, 0, 1, 1).data);
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("title") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const text = luminance(parse(element.closest("svg") ? style.fill : style.color)), page = luminance(behind(element));
    const contrast = (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05);
    found.push([contrast, walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of forty steps on data with markup and control characters, and with such a sample prompt."""
    folder = tmp_path_factory.mktemp("run")
    records = json.loads(data.read_text(encoding="utf-8"))
    records[0]["conversations"][1]["value"] = NASTY
    path = folder / "<b>data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    steps = "--max_steps 40 --logging_steps 1 --learning_rate 1e-2 --save_strategy no --per_device_train_batch_size 2"
    evaluations = f"--eval_split 4 --eval_strategy steps --eval_steps 10 --cache_dir {folder / 'cache'}"
    arguments = command(model_folder, path, folder / "out", steps, evaluations)
    assert main(["train", *arguments, "--sample_prompts", "Who are you?", NASTY]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def inspected(model_folder: Path, run: Path) -> Path:
    """The page of `inspect` for the same data."""
    page = run.parent / "page.html"
    data = run.parent / "<b>data.json"
    flags: list[object] = [
        "--model_name_or_path",
        model_folder,
        "--data_path",
        data,
        "--output",
        page,
        "--eval_split",
        4,
    ]
    flags += ["--cache_dir", run.parent / "cache"]
    assert main(["inspect", *map(str, flags)]) == 0
    return page


def open_page(browser: Any, file: Path, width: int, scheme: str) -> Any:
    """Open a page, and assert that it fetches nothing else and raises no error."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    assert requests == [file.as_uri()] and errors == []
    return page


def assert_readable(page: Any, width: int, scheme: str) -> None:
    """Assert that the page fits the window, has the background of the scheme, and text with contrast."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 3 * 128) == (scheme == "light")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 50 and min(contrasts)[0] >= 4.5, sorted(contrasts)[:5]
    small = page.evaluate("""() => [...document.querySelectorAll("svg")].filter(svg => svg.getClientRects().length)
        .map(svg => 11 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)""")
    assert all(8.5 <= pixels <= 16 for pixels in small), "letters of charts are scaled with them"


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_report_shows_every_point(width: int, scheme: str, run: Path, browser: Any) -> None:
    page = open_page(browser, run / "report.html", width, scheme)
    assert_readable(page, width, scheme)
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    evaluations = len({entry["step"] for entry in history if "eval_loss" in entry})
    assert evaluations == 4
    wanted = {"loss": 40 + evaluations, "throughput": 80, "gradient": 40, "rate": 40, "memory": 40}
    for chart, points in wanted.items():
        visible = page.locator(f"#{chart} .points use").filter(visible=True)
        assert visible.count() == points, chart
    assert page.locator("#lengths .bar").count() > 3
    assert page.locator("figure svg").filter(visible=True).count() == 6
    cut = page.evaluate("""() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
        const picture = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("text")].filter(text => {
            const box = text.getBoundingClientRect();
            return box.width && (box.left < picture.left || box.right > picture.right || box.top < picture.top);
        }).map(text => text.textContent);
    })""")
    assert cut == [], "letters of charts are cut off"


def test_points_show_their_values(run: Path, browser: Any) -> None:
    page = open_page(browser, run / "report.html", 1280, "light")
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    titles = page.locator("#loss .narrow .points title").all_text_contents()
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert titles[: len(losses)] == [f"step {step}: training {loss:.4g}" for step, loss in losses]


def test_points_are_drawn_to_scale(run: Path, browser: Any) -> None:
    page = open_page(browser, run / "report.html", 390, "dark")
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    places = page.evaluate("""() => [...document.querySelectorAll("#rate .points use")]
        .map(point => [point.x.baseVal.value, point.y.baseVal.value])""")
    (x0, y0), (x1, y1) = places[0], places[-1]
    for index, (x, y) in enumerate(places):
        assert x == pytest.approx(x0 + (x1 - x0) * index / 39, abs=0.01)
        assert y == pytest.approx(y0 + (y1 - y0) * (rates[0] - rates[index]) / (rates[0] - rates[-1]), abs=0.01)


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_page_of_inspect_is_readable(width: int, scheme: str, inspected: Path, browser: Any) -> None:
    page = open_page(browser, inspected, width, scheme)
    assert_readable(page, width, scheme)
    assert page.locator("mark").count() > 5


def test_data_is_shown_and_not_interpreted(run: Path, inspected: Path, browser: Any) -> None:
    shown = NASTY.replace("\u202e", "\\u202e").replace("\x07", "\\x07")
    for file in (run / "report.html", inspected):
        page = open_page(browser, file, 1280, "light")
        assert page.title() != "taken" and page.locator("script, img, b:not(.tile b, figcaption b)").count() == 0
        assert shown in page.locator("body").inner_text()
