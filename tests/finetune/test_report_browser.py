"""The report in a real Chromium, opened from the disk with the network switched off."""

import json
from pathlib import Path

import pytest
from browser import Browser
from run_fixture import DPO, GRPO, preferred_lines, rewarded_lines, watched_rows, write_method, write_run

from finetune.report import write_report

WIDTHS = (390, 1280)
UNFINISHED = ("manifest.json", "eval.json", "metrics.jsonl")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("missing", [(), UNFINISHED], ids=["finished", "unfinished"])
def test_report_in_the_browser(browser: Browser, tmp_path: Path, width: int, missing: tuple[str, ...]) -> None:
    page = write_report(write_run(tmp_path, without=missing))
    browser.open(page, width)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.complaints == []
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    # No text may end outside the page either, unless its box scrolls.
    outside = """[...document.querySelectorAll('main p, main h2, main h3, main dd, main svg')].filter(e =>
        !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).length"""
    assert browser.value(outside) == 0
    assert browser.value("document.querySelectorAll('section').length") == 11


@pytest.mark.parametrize("width", (*WIDTHS, 760))
@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_curves_of_every_method_fit(browser: Browser, tmp_path: Path, width: int, kind: str) -> None:
    names = ("math", "think", "a_function_with_a_long_name", *(f"judge_{i}" for i in range(9)))
    method = GRPO | {"rewards": [{"function": {"path": f"pkg:{name}", "weight": 0.5}} for name in names]}
    lines = rewarded_lines(40, names) if kind == "grpo" else preferred_lines(40)
    write_method(tmp_path, method if kind == "grpo" else DPO, lines)
    watched = "".join(json.dumps(row) + "\n" for row in watched_rows(lines, kept=(20,)))
    (tmp_path / "watched.jsonl").write_text(watched, encoding="utf-8")
    browser.open(write_report(tmp_path), width)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.complaints == [] and browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('section').length") == (13 if kind == "grpo" else 11)
    # What stands in a read-out stands within its box, and the box within the plot.
    spilt = """[...document.querySelectorAll('.hit .box')].filter(b => b.getBoundingClientRect().width).filter(b => {
        const box = b.getBoundingClientRect(), svg = b.closest('svg').getBoundingClientRect();
        const texts = [...b.parentElement.querySelectorAll('text')].map(t => t.getBoundingClientRect());
        return box.left < svg.left || box.right > svg.right || box.bottom > svg.bottom
            || texts.some(t => t.right > box.right || t.left < box.left || t.bottom > box.bottom + 1)}).length"""
    assert browser.value("document.querySelectorAll('.hit .box').length") > 40
    assert browser.value(spilt) == 0
    # Charts side by side stand on one line.
    rows = """[...document.querySelectorAll('#training .grid2')].map(grid => [...grid.querySelectorAll('svg')]
        .slice(0, 2).map(svg => Math.round(svg.getBoundingClientRect().bottom)))"""
    assert width < 720 or all(len(set(bottoms)) == 1 for bottoms in browser.value(rows))


def test_dark_scheme_changes_the_page(browser: Browser, tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path))
    colours = []
    for scheme in ("light", "dark"):
        browser.open(page, 1280, scheme=scheme)
        colours.append(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(250, 248, 244)", "rgb(20, 23, 27)"]


def test_the_policy_stops_what_would_slip_in(browser: Browser, tmp_path: Path) -> None:
    """Were a row ever to escape, its script would not run and its image would not load."""
    page = write_report(write_run(tmp_path))
    text = page.read_text(encoding="utf-8")
    slipped = '<script>window.ran = 1</script><img src="https://example.invalid/x.png"></main>'
    page.write_text(text.replace("</main>", slipped), encoding="utf-8")
    browser.open(page, 1280)
    assert browser.value("window.ran === undefined") is True
    assert browser.requests[1:] == ["https://example.invalid/x.png"] and browser.blocked == ["csp"]
    assert len(browser.complaints) == 2 and all("Content Security Policy" in c for c in browser.complaints)
