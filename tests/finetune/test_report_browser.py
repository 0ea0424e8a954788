"""The report in a real Chromium, opened from the disk with the network switched off."""

from pathlib import Path

import pytest
from browser import Browser
from run_fixture import write_run

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
