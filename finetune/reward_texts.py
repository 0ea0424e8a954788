"""Rewards that look only at texts. Each is a pure function of the text and the options in the recipe."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from data_prep.ngrams import words
from finetune.reward_worker import with_standards
from recipes.errors import DataError, RecipeError
from recipes.schema_rewards import Citation, Exact, JsonSchema, Label, Length, Regex, Repetition, Think

LOOKED_AT = 20_000  # characters of a completion that a recipe's own pattern is tried on

# Marks within a number say something (-5, 3.5, 1:30, 50%), and so do signs of arithmetic (C++, <).
_PUNCTUATION = re.compile(r"((?<=\d)[.,:/-](?=\d)|(?<!\w)-(?=\.?\d)|(?<=\d)%)|[^\w\s+<=>|~]|_")
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_QUOTED = re.compile(r"\"([^\"]+)\"|“([^“”]+)”|„([^„“”]+)[“”]|«([^«»]+)»")
_QUOTES = str.maketrans({**dict.fromkeys("“”„«»", '"'), **dict.fromkeys("‘’‚", "'")})


def plain(text: str) -> str:
    """Lower case, without punctuation, articles and spare white space (as SQuAD's evaluation, but numbers stay)."""
    text = unicodedata.normalize("NFKC", text).lower().replace("−", "-")
    text = _PUNCTUATION.sub(lambda match: match[1] or "", text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(answer: str, wanted: str, options: Exact) -> float:
    if options.normalise and plain(wanted):  # of an answer that is only an article nothing would be left
        return float(plain(answer) == plain(wanted))
    return float(answer.strip() == wanted.strip())


def label(answer: str, wanted: str, options: Label) -> float | None:
    """None where the wanted answer is no label. Of labels within each other ("relevant", "not relevant") the longest
    one is meant."""
    names = {" ".join(name.casefold().split()): name for name in sorted(options.labels, key=len, reverse=True)}
    target = " ".join(wanted.casefold().split())
    if target not in names:
        return None
    pattern = "|".join(map(re.escape, names))
    found = re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", " ".join(answer.casefold().split()))
    return float(set(found) == {target})


def looked_at(completion: str, options: Regex) -> str | None:
    """The part of a completion that a pattern is tried on; None where it is too long to be a whole match."""
    return None if options.whole and len(completion) > LOOKED_AT else completion[:LOOKED_AT]


def think(completion: str, options: Think) -> float:
    once = completion.count(options.open) == completion.count(options.close) == 1
    if not once or not completion.startswith(options.open):
        return 0.0
    thought, _, answer = completion.removeprefix(options.open).partition(options.close)
    return float(bool(thought.strip()) and bool(answer.strip()))


def schema_of(options: JsonSchema, place: str | None = None) -> Any:
    """The JSON Schema of a recipe, as JSON values, checked.

    Raises:
        RecipeError: there is no such file, it is no JSON Schema, or it refers to something that is not there.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    schema: Any = options.schema_
    if isinstance(schema, str):
        try:
            schema = json.loads(Path(schema).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"the JSON Schema {options.schema_} cannot be read: {error.strerror}", place) from None
        except ValueError as error:
            raise RecipeError(f"{options.schema_} is no JSON: {error}", place) from None
    if not isinstance(schema, (dict, bool)):
        raise RecipeError(f"{options.schema_} holds a {type(schema).__name__}, which is no JSON Schema", place)
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"no valid JSON Schema: {error.message}", place) from None
    resource, registry = with_standards(schema)
    _resolve_all(resource, registry.resolver(resource.id() or ""), place)
    return schema


def _resolve_all(resource: Any, resolver: Any, place: str | None) -> None:
    from referencing.exceptions import Unresolvable

    resolver = resolver.in_subresource(resource)
    if isinstance(resource.contents, dict) and isinstance(named := resource.contents.get("$ref"), str):
        try:
            resolver.lookup(named)
        except Unresolvable:
            raise RecipeError(f"the JSON Schema refers to {named}, which is not in it", place, "put it in") from None
    for part in resource.subresources():
        _resolve_all(part, resolver, place)


def json_of(answer: str) -> str:
    """The part of an answer that should be JSON: its last block fenced as JSON or as nothing, else all of it."""
    blocks = [body for name, body in _FENCE.findall(answer) if name.lower() in {"json", ""}]
    return blocks[-1] if blocks else answer


def citation(answer: str, passage: str, options: Citation) -> float:
    """Different quotations count once each, however often they are repeated; a full stop or comma that was put inside
    the quotation marks does not count."""
    quoted = {_quotable("".join(found)).strip(" .,;:!?") for found in _QUOTED.findall(answer)}
    quoted = {text for text in quoted if len(text.split()) >= options.min_words}
    source = _quotable(passage)
    stand = sum(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", source) is not None for text in quoted)
    return stand / len(quoted) if quoted else 0.0


def _quotable(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).translate(_QUOTES).casefold().split())


def length(tokens: int, options: Length) -> float:
    """Source: DAPO (Yu et al. 2025, arXiv 2503.14476), equation 13, with L_max = most and L_cache = slack."""
    free = options.most - options.slack
    return 0.0 if tokens <= free else max((free - tokens) / options.slack, -1.0)


def repetition(completion: str, options: Repetition) -> float:
    """Source: open-r1's penalty, after Yeo et al. 2025 (arXiv 2502.03373), with a highest penalty of 1."""
    found = words(completion)
    grams = [tuple(found[i : i + options.words]) for i in range(len(found) - options.words + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def code_of(answer: str) -> str:
    """The last fenced block in Python or no named language; without any, the whole answer."""
    blocks = [body for name, body in _FENCE.findall(answer) if name.lower() in {"python", "py", "python3", ""}]
    return blocks[-1] if blocks else answer


def tests_of(value: Any, row: str) -> list[str]:
    """The tests of a row: a list of texts, or one text, of which every assert at its top level ends a test.

    Raises:
        DataError: the value is neither, or no Python.
    """
    if isinstance(value, (list, tuple)) and all(isinstance(test, str) for test in value):
        return list(value)
    if not isinstance(value, str):
        raise DataError(f"tests are a list of texts or one text, not {type(value).__name__}", row)
    try:
        statements = ast.parse(value).body
    except (SyntaxError, ValueError) as error:
        raise DataError(f"the tests are no Python: {error}", row) from None
    pieces: list[list[str]] = [[]]
    for statement in statements:
        pieces[-1].append(ast.unparse(statement))
        if isinstance(statement, ast.Assert):
            pieces.append([])
    return ["\n".join(piece) for piece in pieces if piece]


def defined_in(code: str) -> set[str]:
    """Functions and classes that Python code defines at its top level; none where it is no Python."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
