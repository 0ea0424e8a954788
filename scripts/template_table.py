"""Write the table of docs/chat-templates.md: what every chat template of a folder does with every shape of chat.

python scripts/template_table.py ../shared/realdata [--write docs/chat-templates.md]
"""

import argparse
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from data_prep.masks import Finding, check_template

# What templates write as single tokens: <|name|>, <｜name｜>, [NAME], and the tags around thoughts and calls.
_SPECIAL = re.compile(r"<[|｜][^|｜<>\n{}'\" ]{1,40}[|｜]>|\[/?[A-Z_]{3,24}\]")
_PLAIN = re.compile(r"</?(?:think|tool_call|tool_response)>")
_BEGIN, _END = "<!-- table begin -->", "<!-- table end -->"
_SHAPES = ("single turn", "system", "multi-turn", "thinking", "multi-turn thinking", "tools")


def tokenizer_for(source: str, realdata: Path) -> Any:
    """The Qwen2 tokenizer of the real data, with the special tokens that a template writes and `<s>`, `</s>` as its
    begin and end tokens, since most templates come without their tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "qwen2")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens(sorted(set(_SPECIAL.findall(source))), special_tokens=True)
    tokenizer.add_tokens(sorted(set(_PLAIN.findall(source))))
    tokenizer.chat_template = source
    return tokenizer


def settings_for(source: str) -> list[dict[str, Any]]:
    """The settings to try: the template's defaults and, where it can be switched, thinking off."""
    return [{}, {"enable_thinking": False}] if "enable_thinking" in source else [{}]


def _cell(finding: Finding) -> str:
    if finding.strategy == "refused":
        return "no"
    notes = ["last" if finding.train_on == "last" else "yes"]
    if finding.rewritten:
        notes.append("rewritten")
    if finding.empty_tools:
        notes.append("`tools: []`")
    if "thinking" in finding.shape and not finding.reasoning:
        notes.append("thoughts left out")
    return ", ".join(notes)


def _code(text: str) -> str:
    return f"`{text}`".replace("\n", "⏎").replace("|", "\\|") if text else ""


def _row(name: str, settings: dict[str, Any], findings: list[Finding]) -> str:
    proven = sorted({finding.strategy for finding in findings} - {"refused"})
    ends = sorted({finding.end_of_turn for finding in findings if finding.end_of_turn})
    reasons: dict[str, tuple[str, list[str]]] = {}
    for finding in findings:
        if finding.reason:
            text = re.sub(r"^turn \d+ \(assistant\): |; [a-z][^;']*$", "", finding.reason)
            # One example for each kind of reason, the shapes it stands for before it.
            reasons.setdefault(text.split("'")[0], (text, []))[1].append(finding.shape)
    why = "; ".join(f"{', '.join(names)}: {text[:240]}" for text, names in reasons.values())
    label = name + ("".join(f" ({key}: {str(value).lower()})" for key, value in settings.items()))
    cells = [_cell(finding) for finding in findings]
    why = why.replace("\n", "⏎").replace("|", "\\|").replace("<", "&lt;")
    return "| " + " | ".join([label, ", ".join(proven) or "refused", " ".join(map(_code, ends)), *cells, why]) + " |"


def table(realdata: Path) -> str:
    """The table of all templates in `realdata/templates`, as Markdown."""
    header = ["template", "proven by", "end of turn", *_SHAPES, "why refused, or why the last turn alone"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for path in sorted((realdata / "templates").glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        for settings in settings_for(source):
            findings = check_template(tokenizer_for(source, realdata), template_kwargs=settings)
            lines.append(_row(path.stem, settings, findings))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("realdata", type=Path)
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    arguments = parser.parse_args()
    made = table(arguments.realdata)
    if arguments.write is None:
        print(made)
        return
    before, rest = arguments.write.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    arguments.write.write_text(f"{before}{_BEGIN}\n{made}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
