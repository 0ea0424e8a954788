"""Where a row names who wrote it: which of its keys sign it, and whether a word in them is a language model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

from recipes.facts import facts
from recipes.names import HUB_ID, family_called, host_named, host_of_model

WRITTEN_BY = (
    *("_teacher", "generator", "teacher", "teacher_model", "teacher_name", "generated_by", "generator_model"),
    *("source_model", "llm"),
)
MODEL_COLUMNS = ("model", "model_name", "model_id")  # may be somebody's product as well
PEOPLE = {"human", "humans", "manual", "expert", "experts", "annotator", "human-written", "crowd"}

# sure: whatever stands there wrote the row. likely: where it is a language model. loose: where it is one that the facts
# know, for mostly it is a person, a web site or a file.
# licence: no signature, but what the row is under.
Kind = Literal["sure", "likely", "loose", "licence"]
_SURE = {" ".join(re.findall(r"[a-z]+", key)) for key in WRITTEN_BY}
_LIKELY = {"model", "models", "generator", "generators", "teacher", "teachers", "llm", "llms", "engine"}
# `model_a`, but not `model_answer`, which is text
_OF_IT = {"name", "names", "id", "slug", "version", "used", "a", "b"}
_LOOSE = {"source", "author", "authors", "written", "created", "annotator", "from", "origin", "provider", "sender"}
_LICENCE = re.compile(r"licen[cs]es?(?: (?:line|type|name|id))?")
_NAMES = {"name", "id", "model", "generator", "teacher", "llm"}  # in an object: what of it names the model
# What the messages and tools of a row say is content, and no statement about the row.
_CONTENT = {"content", "arguments", "tools", "tool_calls", "function", "functions", "function_call", "parameters"}
_PACKED = {"metadata", "meta", "extra", "info", "response", "body", "raw", "distilabel", "config"}
_PRODUCT = {"make", "brand", "manufacturer", "vehicle", "year", "price", "vin", "sku", "mileage", "trim", "serial"}
DEPTH = 12
_FAMILIES = re.compile(
    r"\b(?:chat)?gpt|llama|claude|gemini|mi[sx]tral|qwen|gemma|davinci|kimi|deepseek|vicuna|wizard-?(?:lm|coder|math)|"
    r"dbrx|jamba|codestral|ministral|magistral|devstral|pixtral|exaone|hunyuan|minimax|nemotron|olmo\b|olmo-|smollm|"
    r"text-bison|chat-bison|starcoder|internlm|chatglm|baichuan|stablelm|hyperclova|doubao|openhermes|openorca|pplx",
    re.IGNORECASE,
)
# Words of other trades too: a model where they stand alone or before a version, and not among the marks of a product.
_AMBIGUOUS = re.compile(
    r"(?:sonnet|opus|haiku|zephyr|tulu|orca|guanaco|koala|alpaca|dolly|starling|hermes|falcon|granite|bard|copilot|palm|"
    r"grok|command|nova|titan|solar|ernie|aya|yi|phi|glm|muse|sonar|reka|bloom|opt|mpt|lfm|step|mimo)"
    r"(?:[-_. ]?(?:v?\d[\w.-]*|r|a|plus|pro|lite|micro|premier|max|iml|lm|hf|chat|instruct|beta|alpha|mini|large|"
    r"small))*",
    re.IGNORECASE,
)
_SIZED = re.compile(r"\S*(?:[-_.](?:chat|instruct|it|sft|dpo)\b|[-_.:]\d+(?:\.\d+)?b\b)\S*|o\d(?:-\S+)?", re.IGNORECASE)


def signatures(row: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    """(kind of key, what it names) for every statement in a row, wherever it stands, of who wrote it or of what it is
    under."""
    yield from _inside(row, 0)


def _inside(value: Any, depth: int) -> Iterator[tuple[Kind, str]]:
    if depth > DEPTH:
        return
    if isinstance(value, list):
        for part in value:
            if isinstance(part, dict | list):
                yield from _inside(part, depth + 1)
        return
    is_product = any(str(key).casefold() in _PRODUCT for key in value)
    for key, inner in value.items():
        if inner is None or inner == "":
            continue
        words = key_words(str(key))
        kind = kind_of_key(words)
        if kind == "licence":
            yield from (("licence", text) for text in _texts(inner))
        elif kind is not None:
            for text in _named(inner):
                if kind == "sure" or text.casefold() in PEOPLE or is_model(text, kind == "loose", is_product):
                    yield kind, text
        if isinstance(inner, str) and inner[:1] in "{[" and _PACKED & set(words.split()):
            inner = _unpacked(inner)
        if isinstance(inner, dict | list) and str(key).casefold() not in _CONTENT and kind != "sure":
            yield from _inside(inner, depth + 1)


def _unpacked(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _texts(value: Any) -> list[str]:
    """What a cell states: a text, or each part of a list or an object."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [str(part).strip() for part in parts if part is not None and str(part).strip()]


@lru_cache(4096)
def key_words(key: str) -> str:
    """A key as small words: `modelName`, `model-name` and `model name ` are all `model name`."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", key)
    return " ".join(re.findall(r"[a-z]+", apart.casefold()))


@lru_cache(4096)
def kind_of_key(words: str) -> Kind | None:
    """What a key says about its value, by its words."""
    if words in _SURE:
        return "sure"
    if _LICENCE.fullmatch(words):
        return "licence"
    each = set(words.split())
    if each & _LIKELY and words.split()[-1] in _LIKELY | _OF_IT:
        return "likely"
    return "loose" if each & _LOOSE else None


def _named(value: Any) -> list[str]:
    """What a cell names: a text, each part of a list, of an object what is called name, model or the like."""
    if isinstance(value, dict):
        parts = [v for k, v in value.items() if _NAMES & set(key_words(str(k)).split())] or list(value.values())
        return [text for part in parts for text in _named(part)]
    if isinstance(value, list):
        return [text for part in value for text in _named(part)]
    if value is None:
        return []
    return [text for part in re.split(r"\s*[;|,]\s*|\s+\+\s+", str(value)) if (text := part.strip())]


@lru_cache(16384)
def is_model(text: str, known_only: bool, is_product: bool) -> bool:
    """Whether a word, where a model or a product may stand, is a language model.

    Args:
        known_only: only a name that the facts know, written as models are, counts: a person may be called Claude.
        is_product: beside it stands what only products have, such as a price.
    """
    if len(text) > 100 or text.count(" ") > 6:
        return False
    host = host_named(text.partition(":")[0]) if ":" in text else None
    if known_only:
        if " " in text or "://" in text or len(text) < 5:
            return False
        if "/" in text:
            return facts().model(text.partition("@")[0]) is not None
        return host is not None or ((bool(re.search(r"\d", text)) or text.casefold() == "chatgpt") and _known(text))
    if host is not None or _FAMILIES.search(text):
        return True
    if is_product:
        return False
    hub_id = HUB_ID.fullmatch(text)
    return bool(hub_id or _AMBIGUOUS.fullmatch(text) or _SIZED.fullmatch(text) or _known(text))


def _known(text: str) -> bool:
    return host_of_model(text) is not None or family_called(text) is not None
