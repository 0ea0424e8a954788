"""The report and the model card: what they say, what they never load, and what they do about missing pieces."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from run_fixture import EVAL, HOSTILE, MANIFEST, MASKS, RECIPE, metric_lines, sample_rows, write_run

from finetune.report import write_card, write_report
from recipes.errors import DataError

PIECES = (
    "manifest.json",
    "data/manifest.json",
    "plan.json",
    "preflight.json",
    "metrics.jsonl",
    "eval.json",
    "samples.jsonl",
    "masks.json",
)
BLOCKS = {"p", "div", "td", "th", "dt", "dd", "h1", "h2", "h3", "h4", "li", "span", "title", "summary", "text"}
DAMAGED = ("", "[1, 2", "7\n", "null\n", '{"metrics": 3, "counts": [], "step": "x"}\n', "\udcff")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects the text of each section, every tag with its attributes, and whether the tags close as they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = "top"
        self.texts: dict[str, list[str]] = {}
        self.headings: list[int] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = str(dict(attrs)["id"])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        if tag in BLOCKS:
            self.texts.setdefault(self.section, []).append(" ")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.setdefault(self.section, []).append(data)

    def text(self, section: str) -> str:
        return " ".join("".join(self.texts[section]).split())

    def count(self, tag: str, **wanted: str) -> int:
        return sum(1 for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items())


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def front_matter(folder: Path) -> tuple[dict, str]:
    _, head, body = write_card(folder).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def change(folder: Path, name: str, value: object) -> Path:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def test_result_with_numbers(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    result = page.text("result")
    assert "Exact match, base to tuned 12.1% → 82.9%" in result
    assert "Better; the intervals do not overlap. +70.8 points, p < 0.001 (paired), 240 held-out rows" in result
    assert "base 8.3% to 16.2%" in result and "tuned 77.9% to 87.5%" in result
    top = page.text("top")
    assert "SFT, LoRA, r 16, alpha 32" in top and "2026-11-24 10:12 UTC" in top and "2 min 11 s" in top
    assert "What this report had to do without" not in result
    comparison = page.text("comparison")
    assert "Macro F1 11.2% 8.0% to 15.0% 14.0% 11.0% to 18.0% +2.8 points 0.212 no difference shown" in comparison
    assert "Token F1 45.1% 42.0% to 48.0% 40.2% 38.0% to 43.0% −4.9 points 0.021 worse, intervals overlap" in comparison
    assert "Held-out loss 3.912 3.801 to 4.020 0.634 0.581 to 0.690 −3.278 < 0.001 better, intervals" in comparison


def test_lineage_data_and_preflight_with_numbers(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    lineage = page.text("lineage")
    assert "Allowed, with obligations. The plan is allowed while the duties below are met." in lineage
    assert "Name the authors of example-org/contracts and link to its licence." in lineage
    assert "Lineage: 4 inputs, the run legal, its adapter" in lineage and "163,840 parameters" in lineage
    assert "data embedded:legal:train CC0-1.0 2,400 " + MANIFEST["inputs"][1]["sha256"][:12] in lineage
    data = page.text("data")
    for said in (
        "Rows in 2,400 from 3 sources",
        "Rows kept 2,288 95.3% of rows in",
        "Dropped 112",
        "exact duplicate 71",
    ):
        assert said in data
    assert "Trained tokens 36,018 13.7% of training tokens carry loss" in data
    assert "shortest 38 median 121 90% 208 99% 377 longest 512" in data
    assert "3 rows were truncated; 212 tokens were lost." in data
    preflight = page.text("preflight")
    assert "163,840 of 2,260,480 parameters train (7.2%)." in preflight
    assert "experts 8 3 partly 5 modules are excluded by the recipe" in preflight
    assert (
        "no doubled BOS ✗ failed" in preflight and "enough disk ✓ passed 45.00 GiB free, 92.00 MiB needed" in preflight
    )
    plan = "8 rows per device × 4 accumulated × 1 device = 32 rows or 4,096 tokens per optimiser step."
    assert plan in page.text("plan")
    samples = page.text("samples")
    assert "Greedy answers to 60 held-out prompts. 24 repaired, 12 broken, 12 both right, 12 both wrong." in samples
    assert "Samples 13 to 52" in samples and "Samples 53 to 60" in samples and page.count("article") == 60


def test_page_is_well_formed_and_accessible(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    assert page.open == []
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {str(a["href"])[1:] for t, a in page.tags if t == "a" and str(a.get("href", "")).startswith("#")}
    assert targets <= set(ids) and len(targets) == 11
    drawn = [i for i, (tag, attrs) in enumerate(page.tags) if tag == "svg" and attrs.get("role") == "img"]
    # loss twice and four small curves, the headline and six interval plots, the lineage twice
    assert len(drawn) == 2 + 4 + 1 + 6 + 2
    assert all(page.tags[i + 1][0] == "title" for i in drawn)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    write_run(tmp_path)
    manifest = json.loads(json.dumps(MANIFEST))
    manifest["name"] = HOSTILE
    manifest["inputs"][1]["ref"] = manifest["verdict"]["obligations"][0] = HOSTILE
    manifest["packages"] = {HOSTILE: HOSTILE}
    change(tmp_path, "manifest.json", manifest)
    (tmp_path / "recipe.yaml").write_text(f"# {HOSTILE}\n# ```\nname: legal\n", encoding="utf-8")
    page = report(tmp_path)
    assert page.count("script") == page.count("img") == page.count("iframe") == 0
    assert page.count("style") == 1 and page.open == []
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    shown = " ".join(HOSTILE.split())
    for section in ("top", "lineage", "samples", "masks", "environment", "recipe"):
        assert shown in page.text(section), section
    fields, body = front_matter(tmp_path)
    assert fields["license"] == "apache-2.0"
    assert "<script>" not in re.sub(r"`[^`\n]+`", "", body.split("<details>")[0])  # in a code span it is only text
    assert body.count("````") == 2  # the recipe holds a fence of three, so its own has four


def test_page_loads_nothing(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    page = Page(text)
    policy = next(str(a["content"]) for t, a in page.tags if t == "meta" and "http-equiv" in a)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "script-src" not in rules
    for tag, attrs in page.tags:
        for name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    style = text[text.index("<style>") : text.index("</style>")]
    assert len(style) > 5000 and "url(" not in style and "@import" not in style and "@font-face" not in style
    assert all("url(" not in str(a.get("style", "")) for _, a in page.tags)


@pytest.mark.parametrize("name", PIECES)
def test_each_missing_piece_is_named(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, without=(name,))
    page = report(tmp_path)
    assert f"{name}: not written" in page.text("result")
    assert page.text("result").count("not written") == 1 + (name == "eval.json")
    front_matter(tmp_path)


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_pieces_do_not_crash(tmp_path: Path, name: str, content: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert report(tmp_path).open == []
    assert front_matter(tmp_path)[0]["library_name"] == "peft"


@pytest.mark.parametrize("wrong", [None, True, 3, "x", [], {}, [3], [{}], [{"a": None}], {"a": [1]}], ids=repr)
def test_wrong_types_do_not_crash(tmp_path: Path, wrong: object) -> None:
    write_run(tmp_path)
    for name in (n for n in PIECES if n.endswith(".json")):
        content = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        keys = content if isinstance(content, dict) else ("_id", "pieces")
        spoilt = dict.fromkeys(keys, wrong)
        change(tmp_path, name, spoilt if isinstance(content, dict) else [spoilt])
    for name in ("metrics.jsonl", "samples.jsonl"):
        row = json.loads((tmp_path / name).read_text(encoding="utf-8").split("\n")[0])
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(row, wrong) | {"step": 1}) + "\n", encoding="utf-8")
    assert report(tmp_path).open == []
    assert front_matter(tmp_path)[0]["pipeline_tag"] == "text-generation"


def test_nothing_but_a_recipe(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, without=PIECES))
    assert "Unfinished" in page.text("top") and "stopped before its first step" in page.text("top")
    assert "LoRA, r 16, alpha 32" in page.text("top")  # read from recipe.yaml, for there is no manifest
    assert "No loss was logged" in page.text("training")
    assert page.text("result").count("not written") == len(PIECES) + 1
    fields, body = front_matter(tmp_path)
    assert fields["license"] == "unknown" and "**Unfinished.**" in body and "No evaluation was written." in body


def test_crashed_run(tmp_path: Path) -> None:
    write_run(tmp_path, without=("manifest.json", "eval.json"))
    lines = [line for line in metric_lines() if "loss" in line][:70]
    lines[40]["loss"] = float("nan")
    torn = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 71, "lo'
    (tmp_path / "metrics.jsonl").write_text(torn, encoding="utf-8")
    page = report(tmp_path)
    assert "training reached step 70 of 160" in page.text("top")
    assert "metrics.jsonl: 1 line left out: not a JSON object" in page.text("result")
    assert "1 of 70 logged steps had a loss that is not a finite number" in page.text("training")


def test_resumed_steps_count_once(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = [line for line in metric_lines() if "loss" in line]
    again = [*lines[:50], *({**line, "loss": 9.0} for line in lines[30:])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again), encoding="utf-8")
    said = "Training loss over 160 logged steps: first " + f"{lines[0]['loss']:.3f}, last 9.000"
    assert said in report(tmp_path).text("training")


def test_manifest_can_be_given_before_it_is_written(tmp_path: Path) -> None:
    write_run(tmp_path, without=("manifest.json",))
    # Not yet through JSON, it may hold tuples.
    verdict = {k: tuple(v) if isinstance(v, list) else v for k, v in MANIFEST["verdict"].items()}
    draft = MANIFEST | {"verdict": verdict}
    page = Page(write_report(tmp_path, manifest=draft).read_text(encoding="utf-8"))
    assert "Keep the Apache-2.0 licence text." in page.text("lineage") and "oblige" in page.text("lineage")
    assert "Finished" in page.text("top") and "Allowed, with obligations" in page.text("lineage")
    assert "not written" not in page.text("result")
    assert "- Keep the Apache-2.0 licence text." in write_card(tmp_path, manifest=draft).read_text(encoding="utf-8")


@pytest.mark.parametrize("write", [write_report, write_card])
def test_no_run_is_an_error(tmp_path: Path, write) -> None:
    with pytest.raises(DataError, match="no such run directory; give the directory of a run"):
        write(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no recipe\.yaml"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_writing_leaves_no_other_file(tmp_path: Path) -> None:
    before = {p.name for p in write_run(tmp_path).iterdir()}
    for _ in range(2):
        assert write_report(tmp_path) == tmp_path / "report.html"
        assert write_card(tmp_path) == tmp_path / "README.md"
    assert {p.name for p in tmp_path.iterdir()} - before == {"report.html", "README.md"}


def test_masks_mark_the_trained_text(tmp_path: Path) -> None:
    page = report(change(write_run(tmp_path), "masks.json", MASKS))
    masks = page.text("masks")
    assert "confidentiality<|im_end|>↵" in masks  # neighbouring trained pieces become one mark
    assert "Nothing in this row is trained." in masks
    assert page.count("mark") == 3  # the legend and two rows


def test_card_for_an_embedded_base(tmp_path: Path) -> None:
    fields, body = front_matter(write_run(tmp_path))
    assert fields == {
        "license": "apache-2.0",
        "datasets": ["example-org/contracts-with-a-remarkably-long-name"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["retort", "sft", "lora"],
    }
    assert "| Exact match | 12.1% | 8.3% to 16.2% | 82.9% | 77.9% to 87.5% | +70.8 points | &lt; 0.001 |" in body
    assert "exact match went from 12.1% (base) to **82.9%** (tuned): better" in body
    assert 'AutoModelForCausalLM.from_pretrained("recipes/embedded/tiny")' in body
    assert 'PeftModel.from_pretrained(base, "adapter")' in body
    assert "With 2,260,480 parameters this is a working demonstration" in body
    assert "- Keep the Apache-2.0 licence text." in body
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8").rstrip() in body  # word for word, blank lines too
    compile(body.split("```python\n")[1].split("```")[0], "snippet", "exec")


@pytest.mark.parametrize(
    ("licence", "wanted"),
    [
        ("MIT", {"license": "mit"}),
        ("llama-3.1", {"license": "llama3.1"}),
        ("Acme Model Licence 2", {"license": "other", "license_name": "acme-model-licence-2"}),
        (None, {"license": "unknown"}),
    ],
)
def test_card_for_a_hub_base(tmp_path: Path, licence: str | None, wanted: dict) -> None:
    recipe = RECIPE | {"model": {"base": "acme/On@abc123", "quantization": "nf4"}}
    base = {"role": "base", "ref": "acme/On@abc123", "sha256": None, "license": licence}
    change(write_run(tmp_path), "manifest.json", MANIFEST | {"recipe": recipe, "inputs": [base]})
    fields, body = front_matter(tmp_path)
    assert fields["base_model"] == "acme/On" and fields["base_model_relation"] == "adapter"
    assert {k: v for k, v in fields.items() if k in ("license", "license_name")} == wanted
    assert fields.get("license_link") == ("https://huggingface.co/acme/On" if "license_name" in wanted else None)
    assert fields["tags"] == ["retort", "sft", "lora", "qlora"]
    assert 'from_pretrained("acme/On", revision="abc123", quantization_config=nf4)' in body
    compile(body.split("```python\n")[1].split("```")[0], "snippet", "exec")


def test_card_for_full_fine_tuning(tmp_path: Path) -> None:
    recipe = RECIPE | {"adapter": None, "model": {"base": "acme/base", "quantization": "none"}}
    change(write_run(tmp_path), "manifest.json", MANIFEST | {"recipe": recipe})
    fields, body = front_matter(tmp_path)
    assert (fields["library_name"], fields["base_model_relation"]) == ("transformers", "finetune")
    assert 'AutoModelForCausalLM.from_pretrained("model")' in body and "peft import" not in body


def test_card_is_honest_about_no_gain(tmp_path: Path) -> None:
    only = {"n": 240, "metrics": {"macro_f1": EVAL["metrics"]["macro_f1"]}}
    _, body = front_matter(change(write_run(tmp_path), "eval.json", only))
    assert "does not show that the tuned model is better than its base (macro f1: no difference could be shown)" in body


def test_many_samples_are_capped(tmp_path: Path) -> None:
    write_run(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in sample_rows(530))
    (tmp_path / "samples.jsonl").write_text(rows, encoding="utf-8")
    page = report(tmp_path)
    assert page.count("article") == 500 and "30 more are in samples.jsonl." in page.text("samples")


def test_import_needs_no_torch() -> None:
    code = "import sys, finetune.report; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_both_schemes(tmp_path: Path) -> None:
    """WCAG 2.2, 1.4.3: text of ordinary size needs a ratio of 4.5."""
    text = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\n *\}", text, re.S)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks[:2])
    on_page = [(ink, ground) for ink in ("ink", "muted") for ground in ("paper", "surface", "sunk")]
    on_page += [(c, g) for c in ("tuned", "base", "good", "care", "bad") for g in ("paper", "surface")]
    on_page += [(c, f"{c}-wash") for c in ("good", "care", "bad")] + [("mark-ink", "mark"), ("ink", "bad-wash")]
    for scheme in (light, dark):
        for ink, ground in on_page:
            low, high = sorted((luminance(scheme[ink]), luminance(scheme[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)
