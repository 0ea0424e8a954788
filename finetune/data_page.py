"""The data page: one self-contained HTML file that shows what preparation did to the rows of a recipe.

Everything is computed from `run_dir/data`, whose hashes are checked first. Texts of rows are data, not markup: the
template escapes them, and the page's own policy forbids scripts and loading. Each file is read once, and few rows held.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_prep.assemble import NAMES, STATISTICS
from data_prep.masks import Masked, pieces
from data_prep.prepare import data_dir
from data_prep.tokens import load_tokenizer
from finetune import charts
from finetune.data_rows import (
    CONTAMINATED,
    PERSONAL,
    cut,
    differences,
    ends,
    kept_texts,
    read_dropped,
    spread_rows,
    text_of,
)
from finetune.run_files import DASH, count, dig, moment, number, percent, rows_of, words_of
from recipes.errors import DataError
from recipes.lineage import read_manifest, verify, write_atomic
from recipes.schema import Model
from recipes.student import PROMPTS

MASKS = 6  # rows
READ_MASK, TRAINED_MASK = 500, 1500  # characters of a stretch that is read, or trained, in a shown mask
DUPLICATES = ("exact_duplicate", "near_duplicate", "semantic_duplicate")
STEP_REASONS = {
    "clean": "empty",
    "exact_dedup": "exact_duplicate",
    "near_dedup": "near_duplicate",
    "semantic_dedup": "semantic_duplicate",
}
# Every reason for which a row is dropped, in words: before, in (in the recipe's own order) and behind its steps.
BEFORE = {"bad_row": "cannot be read as a row that the method trains on"}
STEPS = {
    "empty": "nothing is left after cleaning",
    "language": "written in another language",
    "length": "fewer or more tokens than the recipe asks for",
    "quality": "breaks a rule of quality",
    PERSONAL: "holds personal data",
    "exact_duplicate": "equal to an earlier row",
    "near_duplicate": "nearly equal to an earlier row",
    "semantic_duplicate": "means the same as an earlier row",
}
BEHIND = {
    "in_eval": "also among the held-out rows",
    "mixture": "more than the weight of its source allows",
    CONTAMINATED: "overlaps with a held-out row or a benchmark",
    "no_exact_mask": "no exact loss mask can be derived",
    "too_long": "more tokens than train.seq_len",
    "no_trained_token_left": "nothing that is trained is left after cutting",
}
MEANING = {**BEFORE, **STEPS, **BEHIND}
MARKED = {"p50": "median", "p90": "90%", "p99": "99%"}
HOW = {
    "n-gram": "holds {} of the word runs of",
    "near-duplicate": "is {} similar to",
    "code": "holds code that is {} similar to that of",
}
_OVERLAP = re.compile(
    r"(?P<kind>n-gram|near-duplicate|code) of (?P<item>.+), (?P<share>\d+%): (?P<shared>.*)", re.DOTALL
)


@dataclass(frozen=True)
class Data:
    """Prepared data as the page needs it: checked against its manifest."""

    folder: Path
    manifest: dict[str, Any]
    statistics: dict[str, Any]

    @property
    def counts(self) -> dict[str, Any]:
        return dict(self.manifest["counts"])

    @property
    def recipe(self) -> dict[str, Any]:
        return dict(self.manifest["recipe"])

    @property
    def steps(self) -> list[str]:
        return [str(name) for step in rows_of(dig(self.recipe, "data", "steps")) for name in step]

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped rows by reason, in the order in which preparation looks for the reasons."""
        found = self.counts["dropped"]
        asked = [STEP_REASONS.get(step, step) for step in self.steps if step != "decontaminate"]
        order = dict.fromkeys([*BEFORE, *asked, *STEPS, *BEHIND, *sorted(found)])
        return {reason: found[reason] for reason in order if reason in found}


def write_data_page(run_dir: Path) -> Path:
    """Write data.html into a run directory, atomically, and return its path.

    Raises:
        DataError: the directory holds no prepared data, or its files are not what their manifest says.
        RetortError: the page cannot be written.
    """
    run_dir = Path(run_dir)
    page = _environment().get_template("data.html.jinja").render(data_view(read_data(run_dir)))
    path = run_dir / "data.html"
    write_atomic(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def read_data(run_dir: Path) -> Data:
    """Check the prepared data of a run directory and read what describes it.

    Raises:
        DataError: there is none, or a file of it was edited.
    """
    folder = data_dir(run_dir)
    if not folder.is_dir() and (run_dir / PROMPTS).is_dir():  # a teacher has yet to answer them
        folder = run_dir / PROMPTS
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("kind") != "data" or not (folder / STATISTICS).is_file():
        remedy = "`retort prepare RECIPE` makes it; give the run directory, such as runs/legal"
        raise DataError("holds no prepared data", str(run_dir), remedy)
    if wrong := verify(folder):
        remedy = "delete the folder and run `retort prepare` again"
        raise DataError(f"was changed after it was prepared: {', '.join(wrong[:4])}", str(folder), remedy)
    return Data(folder, manifest, json.loads((folder / STATISTICS).read_text(encoding="utf-8")))


def data_view(data: Data) -> dict[str, Any]:
    """What the template shows, section by section, as plain values already worded."""
    clusters = rows_of(data.statistics.get("clusters"))
    wanted = {str(place) for cluster in clusters for place in cluster["places"]}
    dropped = read_dropped(data.folder / "dropped.jsonl", wanted)
    kept = kept_texts(data.folder, {str(cluster["places"][0]) for cluster in clusters})
    masks, no_masks = _masks(data)
    return {
        "name": str(data.recipe.get("name") or data.folder.parent.name),
        "facts": _facts(data),
        "tiles": _tiles(data),
        "notes": _notes(data),
        "funnel": _funnel(data),
        "sources": _sources(data),
        "writers": [(who, count(n)) for who, n in (data.manifest.get("generators") or {}).items()],
        "lengths": [_lengths(data, name) for name in NAMES if name in data.statistics["lengths"]],
        "split": _split(data),
        "clusters": [_cluster(cluster, kept, dropped.texts) for cluster in clusters],
        "compares": any(step in STEP_REASONS and step != "clean" for step in data.steps),
        "duplicates": count(sum(data.dropped.get(reason, 0) for reason in DUPLICATES)),
        "contaminated": _contaminated(data, dropped.samples.get(CONTAMINATED, [])),
        "samples": [_sampled(r, n, dropped.samples.get(r, [])) for r, n in data.dropped.items() if r != CONTAMINATED],
        "unmasked": PERSONAL in data.steps,
        "masks": masks,
        "no_masks": no_masks,
    }


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _facts(data: Data) -> list[tuple[str, str]]:
    asked, limit = data.recipe.get("data") or {}, dig(data.recipe, "train", "seq_len")
    words = {"drop": "dropped", "truncate": "cut", "split": "split", "stop": "an error"}
    longer, bad = (words.get(str(asked.get(key)), DASH) for key in ("too_long", "on_bad_row"))
    return [
        ("Prepared", moment(data.manifest.get("created"))),
        ("Base model", str(dig(data.recipe, "model", "base") or DASH)),
        ("Loss on", {"text": "all of a text"}.get(str(dig(data.recipe, "method", "on")), "the assistant's turns")),
        ("Longest row", f"{count(limit)} tokens; longer ones: {longer}"),
        ("Rows that cannot be read", bad),
        ("Steps", ", ".join(data.steps) or "none"),
        ("Seed", str(data.recipe.get("seed", DASH))),
        ("Retort", str(data.manifest.get("retort_version") or DASH)),
    ]


def _tiles(data: Data) -> list[tuple[str, str, str]]:
    counts, lost = data.counts, sum(data.dropped.values())
    sources = len(rows_of(data.statistics.get("sources")))
    origin = f"from {sources} {'source' if sources == 1 else 'sources'}"
    return [
        ("Rows in", count(counts["rows_in"]), origin),
        ("Rows out", count(counts["rows_out"]), percent(counts["rows_out"], counts["rows_in"]) + " of rows in"),
        ("Dropped", count(lost), "each with its reason" if lost else "no row was dropped"),
        ("Training rows", count(counts["train_rows"]), count(counts["train_tokens"]) + " tokens"),
        ("Held-out rows", count(counts["eval_rows"]), count(counts["eval_tokens"]) + " tokens"),
        (
            "Share in the loss",
            percent(counts["trained_tokens"], counts["train_tokens"]),
            count(counts["trained_tokens"]) + " training tokens",
        ),
    ]


def _notes(data: Data) -> list[str]:
    """What a reader has to know beside the numbers."""
    counts, notes = data.counts, words_of(dig(data.manifest, "tokenizer", "notes"))
    if counts.get("requests"):
        notes.append(f"{count(counts['requests'])} requests for the teacher were made of the rows")
    if counts.get("truncated_rows"):
        lost = count(counts.get("lost_tokens"))
        notes.append(f"{count(counts['truncated_rows'])} training rows were cut at their end; {lost} tokens were lost")
    return notes


def _funnel(data: Data) -> dict[str, Any]:
    """Rows in, what each reason took away, rows out; shares in percent of the rows in."""
    counts = data.counts
    whole = counts["rows_in"] or 1
    left, lines = counts["rows_in"], []
    for reason, lost in data.dropped.items():
        left -= lost
        lines.append(
            {
                "reason": worded(reason),
                "meaning": MEANING.get(reason, ""),
                "rows": count(lost),
                "percent": percent(lost, whole),
                "left": count(left),
                "left_share": 100 * left / whole,
                "lost_share": 100 * lost / whole,
            }
        )
    held = sum(source["eval"] for source in data.statistics["sources"])
    return {
        "rows_in": count(counts["rows_in"]),
        "rows_out": count(counts["rows_out"]),
        "percent": percent(counts["rows_out"], whole),
        "lines": lines,
        "train_share": 100 * (counts["rows_out"] - held) / whole,
        "eval_share": 100 * held / whole,
    }


def worded(reason: str) -> str:
    return reason.replace("_", " ")


def _rows(number_of: int) -> str:
    return f"{count(number_of)} {'row' if number_of == 1 else 'rows'}"


def _sources(data: Data) -> list[dict[str, Any]]:
    roles = {"train": "data"}
    licences = {(i.get("role"), i.get("ref")): i.get("license") for i in rows_of(data.manifest.get("inputs"))}
    return [
        {
            "ref": source["source"],
            "use": {"train": "training", "eval": "held out"}.get(source["role"], source["role"]),
            "license": licences.get((roles.get(source["role"], source["role"]), source["source"])),
            "rows_in": count(source["rows_in"]),
            "train": count(source["train"]),
            "eval": count(source["eval"]),
            "dropped": count(sum(source["dropped"].values())),
            "reasons": [(worded(r), count(n)) for r, n in sorted(source["dropped"].items(), key=lambda kv: -kv[1])],
        }
        for source in data.statistics["sources"]
    ]


def _lengths(data: Data, name: str) -> dict[str, Any]:
    """The histogram of one part, with its percentiles in tokens."""
    shown = data.statistics["lengths"][name]
    found = shown["percentiles"]
    marks = [(f"{label} {count(found[key])}", float(found[key])) for key, label in MARKED.items()]
    title = {"train": "Training rows", "eval": "Held-out rows"}[name]
    chart = charts.bar_chart(
        title, shown["counts"], shown["width"], width=510, height=270, axis="tokens of a row", marks=marks
    )
    rows = data.counts[f"{name}_rows"]
    return {"title": title, "name": name, "rows": count(rows), "chart": chart, "found": found}


def _split(data: Data) -> dict[str, Any]:
    """How rows were held out: by whole groups, as sources of their own, or not at all."""
    asked, groups = dig(data.recipe, "data", "eval"), data.statistics.get("groups") or {}
    if not asked:
        return {"kind": "none"}
    if not groups:
        return {"kind": "sources", "in_eval": count(data.dropped.get("in_eval", 0))}
    fraction, largest = number(dig(asked, "fraction")) or 0.0, groups["largest_share"]
    return {
        "kind": "groups",
        "near": number(dig(asked, "near")),
        "too_large": largest > fraction,
        "facts": [
            ("Rows to split", count(groups["rows"])),
            ("Groups", count(groups["groups"])),
            ("Rows of the largest group", f"{count(round(largest * groups['rows']))} ({percent(largest)})"),
            ("Held out", f"{percent(data.counts['eval_rows'], groups['rows'])} (asked: {percent(fraction)})"),
        ],
    }


def _cluster(cluster: dict[str, Any], kept: dict[str, str], dropped: dict[str, str]) -> dict[str, Any]:
    """The first rows of a cluster. The first of all was kept by its step, though a later one may have dropped it."""
    first, *others = (str(place) for place in cluster["places"])
    text = kept.get(first, dropped.get(first))
    left_out = cluster["size"] - len(cluster["places"])
    return {
        "reason": worded(cluster["reason"]),
        "size": count(cluster["size"]),
        "first": first,
        "begins": charts.shortened(text or first, 90),
        "text": None if text is None else cut(text),
        "copies": [_copy(place, text, dropped.get(place)) for place in others],
        "left_out": _rows(left_out) if left_out > 0 else "",
    }


def _copy(place: str, kept: str | None, text: str | None) -> dict[str, Any]:
    """A row that was dropped for another one, as stretches that differ and that do not."""
    same = text is not None and kept is not None and text.split() == kept.split()
    changes = [("", cut(text or ""))] if kept is None or text is None else [] if same else differences(kept, text)
    return {"place": place, "same": same, "changes": changes}


def _contaminated(data: Data, lines: list[dict[str, Any]]) -> dict[str, Any]:
    steps = rows_of(dig(data.recipe, "data", "steps"))
    asked = next((step["decontaminate"] for step in steps if "decontaminate" in step), None)
    held_out = ["the held-out rows"] if "eval" in (dig(asked, "against") or ()) else []
    benchmarks = [str(i.get("ref")) for i in rows_of(data.manifest.get("inputs")) if i.get("role") == "benchmark"]
    found = data.dropped.get(CONTAMINATED, 0)
    return {
        "asked": asked is not None,
        "against": [*held_out, *benchmarks],
        "count": _rows(found),
        "left_out": _rows(found - len(lines)) if found > len(lines) else "",
        "rows": [{"place": line["_source"], "text": cut(text_of(line)), **_overlap(line["detail"])} for line in lines],
    }


def _overlap(detail: str) -> dict[str, str]:
    """A detail taken apart, as mask_pass.py words it; one that is worded otherwise is shown whole."""
    found = _OVERLAP.fullmatch(detail)
    if found is None:
        return {"item": "", "how": "", "shared": detail}
    how = HOW[found["kind"]].format(found["share"])
    return {"item": found["item"], "how": how, "shared": found["shared"]}


def _sampled(reason: str, rows: int, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Sample rows of one reason. Personal data is not copied onto a page that is made to be passed on."""
    hidden = reason == PERSONAL
    return {
        "reason": worded(reason),
        "meaning": MEANING.get(reason, ""),
        "count": _rows(rows),
        "hidden": hidden,
        "rows": [
            {"place": line["_source"], "detail": line["detail"], "text": "" if hidden else cut(text_of(line))}
            for line in lines
        ],
    }


def _masks(data: Data) -> tuple[list[dict[str, Any]], str]:
    """A few training rows as text with the trained stretches marked; or why there are none."""
    rows = spread_rows(data.folder, "train", MASKS)
    if not rows:
        return [], "No row was tokenised to train on."
    try:
        tokenizer = load_tokenizer(Model.model_validate(data.recipe["model"]))
    except ValueError as error:
        return [], f"The masks are left out: the tokenizer cannot be loaded ({' '.join(str(error).split())})."
    if tokenizer.fingerprint != dig(data.manifest, "tokenizer", "fingerprint"):
        return [], "The masks are left out: the tokenizer is no longer the one that the rows were prepared with."
    return [_mask(row, tokenizer.backend) for row in rows], ""


def _mask(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    shown = pieces(Masked(row["input_ids"], row["loss_mask"], ""), tokenizer)
    # A trained line break is invisible as highlighted white space, so it gets a sign of its own.
    marked = [(ends(t.replace("\n", "↵\n"), TRAINED_MASK) if flag else ends(t, READ_MASK), flag) for t, flag in shown]
    trained = sum(row["loss_mask"])
    return {
        "id": row["_id"],
        "place": row["_source"],
        "pieces": marked,
        "tokens": count(len(row["loss_mask"])),
        "share": percent(trained, len(row["loss_mask"])),
    }
