"""The model card: README.md with the front matter that model hubs read, written from the files of the run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.comparison import GREEDY, compared, headline, student_of
from finetune.labels import base_license, license_fields
from finetune.report_lineage import inputs_of
from finetune.report_method import chain_of, method_facts, method_of, mode_of, rewards_of
from finetune.report_teacher import taught_by
from finetune.run_files import (
    DASH,
    RunFiles,
    adapter_kind,
    count,
    dig,
    duration,
    duties_of,
    lora_alpha,
    moment,
    number,
    percent,
    read_run,
    rows_of,
    table_of,
    words_of,
)
from recipes.lineage import version, write_atomic
from recipes.refs import Ref

RECIPE = """
<details>
<summary>The recipe</summary>

{fence}yaml
{text}
{fence}

</details>
"""
PLAIN_YAML = re.compile(r"[A-Za-z][A-Za-z0-9._/-]*")
YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


@dataclass(frozen=True)
class HandedOver:
    """How a run's weights lie in an exported folder: at its top, beside the texts of these licences."""

    merged: bool
    texts: frozenset[str]


def write_card(
    run_dir: Path, manifest: dict[str, Any] | None = None, target: Path | None = None, how: HandedOver | None = None
) -> Path:
    """Write README.md, the model card, into a run directory or an exported folder, atomically.

    Args:
        run_dir: the run directory; what is missing in it is named in the card.
        manifest: the run's manifest where manifest.json, which is written last, is not there yet.
        target, how: the exported folder, and what it holds.

    Raises:
        DataError: the directory does not exist or holds no recipe.yaml.
    """
    run = read_run(Path(run_dir), manifest)
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown: the filters below escape, each for its place
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters.update(text=markdown_text, code=markdown_code, fence=markdown_fence)
    page = env.get_template("card.md.jinja").render(card_view(run, how))
    fence = markdown_fence(run.recipe_text)
    recipe = RECIPE.format(fence=fence, text=run.recipe_text.rstrip())
    path = (target or run.path) / "README.md"
    write_atomic(path, re.sub(r"\n{3,}", "\n\n", page) + recipe)
    return path


def card_view(run: RunFiles, how: HandedOver | None = None) -> dict[str, Any]:
    """What the card's template shows."""
    recipe, verdict, metrics = run.recipe, run.manifest.get("verdict"), compared(run.evaluation)
    counts = run.counts
    parameters, chain, method = number(run.preflight.get("total_parameters")), chain_of(run), method_of(run)
    folder = next((f for f in ("adapter", "model") if (run.path / f).is_dir()), "adapter" if run.adapter else "model")
    merged = how is not None and how.merged
    return {
        "front": front_matter(run, how),
        "merged": merged,
        "handed": how is not None,
        "name": run.name,
        "finished": bool(run.manifest),
        "base": {"ref": run.base or DASH, "license": base_license(run) or "unknown", **_loading(run.base_ref)},
        "adapter": _adapter_facts(run),
        "kind": adapter_kind(run),
        "folder": "." if how is not None else folder,
        "has_tokenizer": (run.path / folder / "tokenizer_config.json").is_file(),
        "quantization": run.quantization,
        "confidence": run.confidence,
        "method": method,
        "settings": [(term, value) for term, value, _ in method_facts(run) if term not in ("Rewards", "Teacher")],
        "teacher": taught_by(run),
        "rewards": rewards_of(run),
        "chain": chain,
        # An adapter on a merged run fits no base as it is.
        "whole": chain is not None and chain.merged and folder == "adapter" and not merged,
        "auto": f"AutoModelFor{'SequenceClassification' if method.kind == 'reward' else 'CausalLM'}",
        "chats": dig(recipe, "method", "on") != "text",
        "train": recipe.get("train") if isinstance(recipe.get("train"), dict) else {},
        "steps": count(run.training[-1].get("step")) if run.training else DASH,
        "seconds": duration(run.training[-1].get("seconds")) if run.training else DASH,
        "inputs": inputs_of(run),
        "counts": counts,
        "share": percent(counts.get("trained_tokens"), counts.get("train_tokens")),
        "count": count,
        "metrics": metrics,
        "student": student_of(metrics),
        "taught": any(metric["teacher"] for metric in metrics),
        "greedy": any(metric["key"] in GREEDY for metric in metrics),
        "headline": headline(metrics),
        "n": count(run.evaluation.get("n")),
        "verdict": str(dig(verdict, "verdict") or "not judged"),
        "obligations": duties_of(verdict),
        "unknown": words_of(dig(verdict, "unknown")),
        "attestations": rows_of(recipe.get("attest")),
        "parameters": count(parameters),
        "small": parameters is not None and parameters < 100e6,
        "version": str(run.manifest.get("retort_version") or version()),
        "created": moment(run.manifest.get("created")),
        "commit": str(dig(run.manifest, "code", "commit") or "unknown"),
        "dirty": bool(dig(run.manifest, "code", "dirty")),
        "packages": {k: v for k, v in table_of(run.manifest.get("packages")).items() if k in _TOLD},
    }


_TOLD = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}


def front_matter(run: RunFiles, how: HandedOver | None = None) -> str:
    """The YAML block, without its fences.

    `base_model` and `datasets` take hub identifiers only (the hub refuses others), so an embedded or local one is named
    in the text and in manifest.json instead. Weights into which an adapter was merged are a fine-tune of their base;
    the hub means by a merge one of several models.
    """
    adapter = bool(run.adapter) and not (how is not None and how.merged)
    tags = ["retort", "distillation" if mode_of(run) else str(dig(run.recipe, "method", "type") or "sft")]
    if adapter:
        tags += dict.fromkeys(["lora", adapter_kind(run).lower()])
    elif not run.adapter:
        tags.append("full-fine-tuning")
    fields: dict[str, Any] = {**license_fields(run, how.texts if how is not None else ())}
    if run.base_ref is not None and run.base_ref.kind == "hub":
        fields |= {"base_model": run.base_ref.name, "base_model_relation": "adapter" if adapter else "finetune"}
    if datasets := _hub_datasets(run.recipe):
        fields["datasets"] = datasets
    fields |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if method_of(run).kind == "reward" else "text-generation",
        "tags": tags,
    }
    return "\n".join(line for key, value in fields.items() for line in _yaml_lines(key, value))


def _hub_datasets(recipe: dict[str, Any]) -> list[str]:
    sources = [*rows_of(dig(recipe, "data", "train")), *rows_of(dig(recipe, "data", "eval"))]
    return list(dict.fromkeys(str(s["hub"]).partition("@")[0] for s in sources if s.get("hub")))


def _adapter_facts(run: RunFiles) -> dict[str, Any]:
    """The adapter's settings that differ from leaving a thing out."""
    told = {
        k: v for k, v in run.adapter.items() if k not in ("type", "alpha") and v not in (None, False, [], "default")
    }
    told = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in told.items()}
    return {**told, "alpha": f"{lora_alpha(run):g}"} if lora_alpha(run) is not None else told


def _loading(ref: Ref | None) -> dict[str, str]:
    """What `from_pretrained` is given for the base, and where that lies."""
    if ref is None:
        return {"path": "PATH/TO/THE/BASE", "revision": "", "where": "the recipe names no base model"}
    if ref.kind == "embedded":
        return {"path": f"recipes/embedded/{ref.name}", "revision": "", "where": "a folder in the checkout of Retort"}
    where = "" if ref.kind == "hub" else "a folder on the machine that trained it"
    return {"path": ref.name, "revision": ref.revision or "", "where": where}


def _yaml_lines(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"{key}:", *(f"- {_yaml_scalar(str(v))}" for v in value)]
    return [f"{key}: {_yaml_scalar(value)}"]


def _yaml_scalar(text: str) -> str:
    plain = PLAIN_YAML.fullmatch(text) and text.lower() not in YAML_WORDS
    return text if plain else json.dumps(text)  # a JSON string is a YAML double-quoted scalar


def markdown_text(value: Any) -> str:
    """A value as one line of plain text, also inside a table cell."""
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", line)


def markdown_code(value: Any) -> str:
    """A value as a code span, also inside a table cell, whatever backticks it holds."""
    line = " ".join(str(value).split()) or DASH
    ticks = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}".replace("|", "\\|")


def markdown_fence(value: Any) -> str:
    """A fence longer than any run of backticks in the text."""
    return "`" * max(3, max((len(run) for run in re.findall("`+", str(value))), default=0) + 1)
