"""`modekit report`: the page shows what the results say, it runs nothing of the data, and people can read it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape

from conftest import DOMAINS, Workshop, make_workshop
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.inspection.result import Inspection
from modekit.evaluation.results import Results, Row, Score, with_gaps
from modekit.evaluation.tables import cells_of
from modekit.evaluation.tasks.results import TaskResults
from modekit.report.page import write_report
from modekit.report.sections import gap_chart
from modekit.routing.fit import refit
from modekit.training.train import train
from refusal import run_python
from trained import short_settings

LIMIT = 2_000_000
LOGISTIC = {"method": "routing", "top_k": 2, "router": {"fit": "logistic", "tokens_per_domain": 600, "sequence_length": 32}}
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror=window.hacked=1>",
    "{{ 7 * 7 }}",
    "<!--",
    "]]>",
    "\u2028\u2029",
    "&lt;b&gt;",
    "' onmouseover='window.hacked=1",
    "a\nb",
    "\\u003c",
    "</style>",
    "",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def inspection_of(
    checkpoint: Checkpoint,
    *,
    routers: list[tuple[int | None, str]] | None = None,
    domains: tuple[str, ...] = DOMAINS,
    unseen: tuple[str, ...] = ("music",),
    tokens: int = 40,
    texts: int = 2,
    pieces: tuple[str, ...] = HOSTILE,
) -> dict[str, Any]:
    """An inspect.json of the agreed shape, with numbers that are drawn."""
    draw = np.random.default_rng(0)
    experts = checkpoint.names
    routers = routers or [(layer, "mlp") for layer in range(checkpoint.layers)]

    def weights(*shape: int) -> list[Any]:
        return draw.dirichlet(np.full(len(experts), 0.3), size=shape).tolist()

    per_domain = {
        name: {
            "expert": name if name in experts else None,
            "loss": float(draw.uniform(3, 5)),
            "shares": weights(len(routers)),
            "chosen": weights(len(routers)),
            "entropy": draw.uniform(0, 1, len(routers)).tolist(),
            "agreement": draw.uniform(0, 1, len(routers)).tolist() if name in experts else None,
            "without": {expert: float(draw.normal(0, 0.1)) for expert in experts},
        }
        for name in (*domains, *unseen)
    }
    samples = []
    for name in (*domains, *unseen):
        for _ in range(texts):
            words = [pieces[place % len(pieces)] for place in range(tokens)]
            losses = [None, *draw.uniform(0, 9, tokens - 1).tolist()]
            samples.append(
                {
                    "domain": name,
                    "loss": float(np.mean(losses[1:])),
                    "tokens": [{"text": word, "loss": loss} for word, loss in zip(words, losses, strict=True)],
                    "weights": weights(len(routers), tokens),
                    "without": {expert: float(draw.normal(0, 0.1)) for expert in experts},
                }
            )
    alike = draw.uniform(-0.2, 0.9, (len(experts), len(experts)))
    np.fill_diagonal(alike, 1)
    return {
        "format": 1,
        "checkpoint": checkpoint.identity,
        "experts": experts,
        "per_domain": per_domain,
        "routers": [{"name": f"r{i}.gate", "layer": layer, "module": module} for i, (layer, module) in enumerate(routers)],
        "similarity": alike.tolist(),
        "top_tokens": {expert: list(pieces) for expert in experts},
        "texts": samples,
        "notes": ["a note with <i>markup</i>"],
        "a key of a later version": 1,
    }  # type: ignore[no-any-return]


def put(checkpoint: Checkpoint, name: str, data: object) -> None:
    folder = checkpoint.folder / "results"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))


def tasks_of(checkpoint: Checkpoint) -> dict[str, Any]:
    asked = {"higher_is_better": True, "items": 8}
    rows = {"base": {"value": 0.25, "error": 0.03}, "mixture": {"value": 0.5}}
    return {
        "format": 1,
        "checkpoint": checkpoint.identity,
        "notes": ["three <questions>"],
        "later": 1,
        "tasks": {
            "qa <i>1</i>": {"metric": "accuracy", "rows": rows, **asked},
            "items": {"metric": "rouge", "rows": {"mixture": {"value": 0.125, "n": 3}}, **asked},
        },
    }


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def told(workshop: Workshop) -> Checkpoint:
    """A trained checkpoint with everything a report can show, and a licence that is not to be trusted."""
    (workshop.root / "law" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: <script>window.hacked=1</script>\nlicense_link: javascript:window.hacked=1\n---\n"
    )
    workshop.recipe["eval"] = {"music": str(write_music(workshop.root))}
    checkpoint = open_checkpoint(workshop.build("TOLD", mixture=LOGISTIC))
    settings = short_settings(steps=4, batch_tokens=300, select_tokens=300, learning_rate=0.02)
    done = train(checkpoint, settings, evaluate_tokens=400)
    assert done.improved
    evaluate(done.checkpoint, tokens_per_domain=400, sequence_length=32)
    put(done.checkpoint, "inspect.json", inspection_of(done.checkpoint))
    put(done.checkpoint, "tasks.json", tasks_of(done.checkpoint))
    return done.checkpoint


def write_music(root: Path) -> Path:
    path = root / "text" / "music.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} a rose is a rose is a rose"}) for n in range(30)))
    return path


@pytest.fixture(scope="module")
def page(told: Checkpoint) -> Path:
    report = write_report(told)
    assert report.notes == []
    return report.page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium was found, and CI must not pass without having looked at the page")
        pytest.skip("no Chromium was found")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Opened]:
    """Open a page; at the end nothing was wrong, nothing was fetched and nothing of the data has run."""
    contexts, wrong, fetched = [], [], []

    def open_page(file: Path = page, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: fetched.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        for tab in context.pages:
            assert tab.evaluate("window.hacked") is None
        context.close()
    assert wrong == []
    assert len(fetched) == len(contexts) and all(url.startswith("file:") and url.endswith(".html") for url in fetched)


class Tags(HTMLParser):
    """The tags of a page, and their attributes; each is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "input", "br", "path", "rect"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in {"path", "rect"} or self._open.pop() == tag


def test_the_page_shows_what_was_found(told: Checkpoint, page: Path) -> None:
    """Every figure of the tables in the files beside it, and the gap."""
    html = page.read_text()
    for kind in (Results, Inspection, TaskResults):
        found = kind.find(told)
        assert found is not None
        for table in found.tables():
            lines = [line for row in table.rows for cell in cells_of(row) for line in cell.text.split("\n")]
            assert table.prose or all(str(escape(line)) in html for line in lines)
    assert "Gap closed" in html
    before = told.record.training[-1].select_loss["law"]["before"]
    assert f"{before:.4f}" in html
    assert write_report(told).page.read_text() == html  # the same results give the same bytes


def test_the_page_runs_no_script(opened: Opened, page: Path) -> None:
    """A script that got in by markup is stopped by the policy: one that we put there ourselves does not run."""
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("</main>", "<script>window.got_in = 1</script></main>"))
    context = opened().context
    tab = context.browser.new_context().new_page()
    tab.goto(broken.as_uri())
    assert tab.evaluate("window.got_in") is None
    assert tab.locator(".tok").count() == 40 * (len(DOMAINS) + 1)
    tab.context.close()
    broken.unlink()


def test_a_token_has_the_colour_of_the_expert_that_leads(told: Checkpoint, opened: Opened) -> None:
    found = Inspection.find(told)
    assert found is not None
    shown = opened().locator(".tokens").first.locator(".tok")
    for place, token in enumerate(found.texts[0].tokens):
        means = np.mean([rows[place] for rows in found.texts[0].weights], axis=0)
        leader = int(np.argmax(means))
        assert f"e{leader % 8}" in shown.nth(place).get_attribute("class").split()
        said = "-" if token.loss is None else f"{token.loss:.2f}"
        assert shown.nth(place).get_attribute("title") == f"{found.experts[leader]} {means[leader]:.2f}, loss {said}"


def test_text_of_others_is_shown_and_never_run(opened: Opened, page: Path) -> None:
    tab = opened()
    assert tab.locator(".tok").all_text_contents()[: len(HOSTILE)] == list(HOSTILE)
    body = tab.locator("body").inner_text()
    for text in ("a note with <i>markup</i>", "qa <i>1</i>", "three <questions>"):
        assert text in body
    assert tab.locator("#main b, #main img, #main i").count() == 0
    links = tab.locator("a").evaluate_all("nodes => nodes.map(node => node.getAttribute('href'))")
    assert links and all(link.startswith("#") for link in links)
    assert "<script" not in page.read_text()


def test_a_phone_scrolls_tables_and_not_the_page(opened: Opened) -> None:
    tab = opened(viewport={"width": 390, "height": 800}, device_scale_factor=2)
    tab.locator("details").evaluate_all("nodes => nodes.forEach(node => node.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    boxes = tab.locator(".box").evaluate_all("nodes => nodes.map(node => node.scrollWidth > node.clientWidth)")
    assert any(boxes)
    charts = tab.locator(".chart").evaluate_all("nodes => nodes.map(node => node.getBoundingClientRect().right)")
    assert all(right <= 390 for right in charts)  # a chart is never cut
    narrow = tab.locator("main p").evaluate_all("nodes => Math.max(...nodes.map(node => node.getBoundingClientRect().right))")
    assert narrow <= 390


_CONTRASTS = """() => {
  const blank = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const canvas = blank.getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const over = (top, below) => [0, 1, 2].map((k) => top[k] * top[3] + below[k] * (1 - top[3])).concat([1]);
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (c) => { const l = c.slice(0, 3).map((v) => linear(v / 255));
    return .2126 * l[0] + .7152 * l[1] + .0722 * l[2]; };
  const under = (node) => { const layers = []; for (let at = node; at; at = at.parentElement)
    layers.push(rgba(getComputedStyle(at).backgroundColor)); let colour = [255, 255, 255, 1];
    for (const layer of layers.reverse()) colour = over(layer, colour); return colour; };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    if (!text || node.closest(".sr,.skip") || !node.checkVisibility()) continue;
    const style = getComputedStyle(node), below = under(node);
    const ink = over(rgba(node.closest("svg") ? style.fill : style.color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), node.tagName + "." + (node.getAttribute("class") || "") + ": " + text.slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(opened: Opened, scheme: str) -> None:
    tab = opened(color_scheme=scheme)
    tab.locator("details").evaluate_all("nodes => nodes.forEach(node => node.open = true)")
    found = tab.evaluate(_CONTRASTS)
    assert len(found) > 400
    assert [entry for entry in found if entry[0] < 4.5] == []


def test_who_does_not_see_it_can_use_it(opened: Opened, page: Path) -> None:
    """Landmarks, headings in order, captions, scopes, names; every scrolling box can be reached by keyboard."""
    tags = Tags(page.read_text()).tags
    names = [tag for tag, _ in tags]
    assert [names.count(tag) for tag in ("main", "header", "footer", "h1", "nav")] == [1] * 5
    levels = [int(tag[1]) for tag in names if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert names.count("caption") == names.count("table") > 8
    assert all("scope" in given for tag, given in tags if tag == "th")
    for tag, given in tags:
        if tag == "svg":
            assert given.get("aria-hidden") == "true" or given.get("aria-label")
        if "box" in str(given.get("class")).split():
            assert given.get("tabindex") == "0" and given.get("aria-label") and given.get("role") == "region"
    html = next(given for tag, given in tags if tag == "html")
    assert html["lang"] == "en"
    tab = opened()
    assert tab.title() == "TOLD: modekit report"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.locator(".skip").bounding_box()["x"] >= 0


def large(checkpoint: Checkpoint) -> dict[str, Any]:
    """64 layers with a router per projection, and texts of more domains than a page has room for."""
    routers = [(layer, part) for layer in range(64) for part in ("q", "k", "v", "o", "gate", "up", "down")]
    unseen = tuple(f"unseen{number}" for number in range(40))
    return inspection_of(checkpoint, routers=routers, unseen=unseen, tokens=20, texts=1, pieces=("word ",))


def test_a_large_mixture_fits_into_a_page(workshop: Workshop, opened: Opened) -> None:
    checkpoint = open_checkpoint(workshop.build("LARGE"))
    put(checkpoint, "inspect.json", large(checkpoint))
    report = write_report(checkpoint)
    assert report.page.stat().st_size < LIMIT
    assert opened(report.page).locator("#words h3").all_text_contents()[:4] == [*DOMAINS, "unseen0"]


def test_results_of_another_state_are_left_out_and_said_so(workshop: Workshop, opened: Opened) -> None:
    checkpoint = open_checkpoint(workshop.build("OLD", mixture=LOGISTIC))
    evaluate(checkpoint, tokens_per_domain=200, sequence_length=32)
    put(checkpoint, "inspect.json", inspection_of(checkpoint))
    assert write_report(checkpoint).notes == []
    changed = refit(checkpoint, {"router": {"temperature": 0.01}})
    report = write_report(changed)
    assert [note.split()[0] for note in report.notes] == ["eval.json", "inspect.json"]
    assert all("another state" in note for note in report.notes)
    assert "`modekit eval`" in report.notes[0] and "`modekit inspect`" in report.notes[1]
    text = opened(report.page).locator("body").inner_text()
    assert "Left out of this page" in text and "modekit inspect" in text and "Word by word" not in text
    assert "statistics on disk" in text


def test_a_report_needs_no_torch(workshop: Workshop) -> None:
    out = workshop.build("LIGHT")
    done = run_python(
        "import sys\nfrom modekit.cli import main\nsys.argv = ['modekit', 'report', sys.argv[1]]\n"
        "try: main()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)",
        out,
    )
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout


def test_a_checkpoint_without_results_has_a_page_that_says_what_to_run(workshop: Workshop, opened: Opened) -> None:
    checkpoint = open_checkpoint(workshop.build("NEW"))
    report = write_report(checkpoint)
    assert report.notes == ["there is no eval.json: run `modekit eval`", "there is no inspect.json: run `modekit inspect`"]
    assert report.page == checkpoint.folder / "results" / "report.html"
    opened(report.page)


def evenly(loss: float) -> Score:
    """The same loss on all of a text."""
    return Score(loss, blocks=((10 * loss, 10),) * 2)


def test_gaps_are_bars_with_errors_and_names_are_text() -> None:
    """One bar a row, from 0; a domain without a gap has none; with several domains their mean is the last."""
    losses = {"base": (5.0, 4.0), "<b>law": (4.0, 4.0), "code": (5.0, 3.0), "mixture": (4.25, 3.5)}
    rows = [
        Row(name, "base" if name == "base" else "mixture" if name == "mixture" else "expert", 1, 1, scores, "")
        for name, each in losses.items()
        if (scores := {domain: evenly(loss) for domain, loss in zip(("<b>law", "code"), each, strict=True)})
    ]
    results = Results(with_gaps(rows, ["<b>law", "code"]), ["<b>law", "code"], [])
    chart = str(gap_chart(results))
    assert chart.count('class="of-mixture"') == 3 and ">0.75 ±" in chart and ">0.50 ±" in chart and ">0.62 ±" in chart
    assert "&lt;b&gt;law" in chart and "<b>" not in chart
    assert gap_chart(Results(rows, ["code"], [])) == ""
