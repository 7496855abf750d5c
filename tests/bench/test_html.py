"""The page in a real browser: with nothing but itself it shows its charts, finds its texts, and mixes no protocols."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from errata import LM, Case, Edit
from errata.bench import Plan, Results, run_grid
from errata.bench.html import page as html
from tests import tiny

CHROMIUM = shutil.which("chromium")
QUIET = [f"--{flag}" for flag in ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")]
QUIET += ["--disable-background-networking", "--disable-component-update"]
pytestmark = pytest.mark.filterwarnings("ignore:.*has no published settings")
MARKUP = "<img src=x onerror=alert(1)></script><b>Lima"


@pytest.fixture(scope="module")
def results(gpt2: LM, cases: list[Case]) -> Results:
    methods = {"ft-m": {"layers": (2,), "steps": 8, "rate": 5e-3}, "grace": {"at": 2, "steps": 4}}
    plan = Plan(method=methods, regime=("single", "sequential"), checkpoints=(1, 2))
    odd = Case("odd", Edit(tiny.PROMPT, "Kenya", MARKUP, "Nairobi"), relation="P36")
    return run_grid(plan, gpt2, [*cases[:3], odd])


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here; apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html(results), encoding="utf-8")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=60_000)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.wrong, page.asked_for = [], []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (page.wrong.append("a dialog"), dialog.dismiss()))
        page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: page.asked_for.append(request.url))
        page.goto(path.as_uri(), timeout=60_000)
        yield page
        browser.close()


def test_the_page_needs_nothing_but_itself(results: Results):
    text = html(results)
    assert text.startswith("<!doctype html>")
    for word in ("http://", "https://", "src=", "@import", "url(", "<link"):
        assert word not in text.replace("<img src=x", "").replace("img src=x", ""), word
    assert "</script><b>Lima" not in text


def test_it_opens_without_an_error_or_a_request(page: Any):
    page.locator("#texts tbody tr").first.wait_for()
    assert page.wrong == []
    assert [url for url in page.asked_for if not url.startswith("file:")] == []
    assert len(page.asked_for) == 1


def test_every_mark_stands_where_its_number_is(page: Any, results: Results):
    """Read from the drawn page: the place of each mark along its panel is the mean in the report."""
    marks = page.evaluate(
        """() => [...document.querySelectorAll('main section:first-of-type .wide g')].map(g => ({
            said: g.querySelector('title').textContent, protocol: g.getAttribute('class'),
            middle: (b => b.x + b.width / 2)(g.querySelector('.mark').getBBox()),
            shape: g.querySelector('.mark').tagName}))"""
    )
    shapes = {"forced": "circle", "compare": "path", "generated": "rect"}
    lefts: dict[str, set[float]] = {}
    for mark in marks:
        run, number = mark["said"].split(": ", 1)
        name, value = number.split(": ")
        metric, protocol = name.split(", ")
        method, regime = run.split(", ")
        report = next(r for r in results.reports if (r.about["method"], r.about["regime"]) == (method, regime))
        mean = report.summary[metric][protocol]["mean"]
        assert value.startswith(f"{mean:.3f}")
        assert (mark["shape"], mark["protocol"]) == (shapes[protocol], protocol)
        lefts.setdefault(metric, set()).add(round(mark["middle"] - 210 * mean))
    asked = [f for r in results.reports for m in r.summary.values() for f in m.values() if f["mean"] is not None]
    assert len(marks) == len(asked)
    assert all(max(found) - min(found) <= 1 for found in lefts.values())


def test_the_table_of_numbers_is_the_summary(page: Any, results: Results):
    text = page.locator("section", has_text="The numbers").first.locator("table").inner_text()
    for report in results.reports:
        for protocols in report.summary.values():
            for found in protocols.values():
                if found["mean"] is not None:
                    assert f"{found['mean']:.3f}" in text


def test_every_number_stands_under_its_own_protocol_and_metric(page: Any, results: Results):
    cells = page.evaluate(
        """() => {
            const at = (e) => e.getBoundingClientRect(), head = document.querySelector('table.numbers').tHead;
            const covers = (h, c) => at(h).left <= at(c).left + 1 && at(c).right <= at(h).right + 1;
            const over = (row, c) => [...row.cells].find((h) => covers(h, c)).innerText;
            return [...document.querySelectorAll('table.numbers td[title]')].map((c) => [
                over(head.rows[1], c), over(head.rows[0], c), c.title]); }"""
    )
    asked = [f for r in results.reports for m in r.summary.values() for f in m.values() if f["mean"] is not None]
    assert len(cells) == len(asked)
    for metric, protocol, said in cells:
        assert said.startswith(f"{metric}, {protocol}: ")


def test_texts_are_found_filtered_and_opened(page: Any, results: Results):
    def rows() -> int:
        return page.locator("#texts tbody tr:not(.probe)").count()

    count = page.locator("#count")
    assert rows() == 4 * 4
    page.fill("#find", "france")
    assert rows() == 4
    assert count.inner_text() == "4 of 16 edits"
    page.select_option("#method", "grace")
    page.select_option("#regime", "single")
    assert rows() == 1
    row = next(r for r in results.reports[2].rows if r["edit"]["subject"] == "France")
    shown = page.locator("#texts tbody tr").first.inner_text()
    for text in (row["before"], row["after"], row["edit"]["target"]):
        assert text in shown
    page.locator("#texts button").first.press("Enter")
    assert page.locator("#texts tr.probe").count() == len(row["probes"])
    assert page.locator("#texts button").first.get_attribute("aria-expanded") == "true"
    page.fill("#find", "")
    page.select_option("#method", "")
    page.select_option("#regime", "")
    page.select_option("#which", "miss")
    missed = sum(r["metrics"]["reliability"]["generated"] != 1 for p in results.reports for r in p.rows)
    assert rows() == missed
    page.select_option("#which", "")


def test_a_models_answer_is_never_markup(page: Any):
    page.fill("#find", "kenya")
    assert "<img src=x onerror=alert(1)>" in page.locator("#texts tbody").inner_text()
    assert page.locator("#texts img").count() == 0
    assert page.wrong == []
    page.fill("#find", "")


def test_the_curves_are_the_retention(page: Any, results: Results):
    said = page.locator("section", has_text="What a sequence retains").locator("title").all_text_contents()
    for report in results.reports:
        for one in report.about.get("retention", []):
            mean = one["summary"]["reliability"]["generated"]["mean"]
            assert any(f"{one['after']}: {mean:.3f}" in text for text in said)


def test_it_can_be_read_by_everybody(page: Any):
    assert page.locator("html").get_attribute("lang") == "en"
    for each in page.locator("table").all():
        assert each.locator("caption").count() == 1 or each.get_attribute("class") == "heat"
        assert each.locator("th[scope]").count() > 0
    for each in page.locator("section svg").all():
        assert each.get_attribute("aria-label") or each.get_attribute("aria-hidden") == "true"
    for each in page.locator("input, select").all():
        assert each.evaluate("e => e.labels.length") == 1
    for dark in (False, True):
        page.emulate_media(color_scheme="dark" if dark else "light")
        assert page.evaluate(CONTRAST) >= 4.5, f"dark={dark}"


CONTRAST = """() => {
    const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const light = (rgb) => rgb.map((v) => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const read = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const paper = light(read(getComputedStyle(document.body).backgroundColor));
    const inks = ['body', '.lead', 'th.forced', 'th.compare', 'th.generated', 'small', '.mark-of-errata'].map(
        (one) => light(read(getComputedStyle(document.querySelector(one)).color)));
    return Math.min(...inks.map((ink) => (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05)));
}"""
