"""Looks at texts of a model in a process of its own, in code that a text can keep busy for hours (`9^9^9^9`, `(a+)+$`)
and that no signal handler and no thread gets to interrupt. `limited.py` starts it and asks it."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

SECONDS = 2.0  # of processor time for one question; then the kernel ends this process
MEMORY = 2 * 2**30  # bytes


def _math(options: None) -> Callable[[str, str], bool]:
    logging.disable(logging.WARNING)  # that its own timeouts are off
    from math_verify import LatexExtractionConfig, parse, verify

    def equal(gold: str, given: str) -> bool:
        both = [parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (gold, given)]
        return all(both) and bool(verify(*both, timeout_seconds=None))

    return equal


def _regex(options: dict[str, Any]) -> Callable[[str], bool]:
    pattern = re.compile(options["pattern"], re.DOTALL)
    found = pattern.fullmatch if options["whole"] else pattern.search
    return lambda text: found(text) is not None


def _json_schema(schema: Any) -> Callable[[str], bool]:
    """Nothing is ever fetched: what `$ref` names must be in the schema, or be a standard meta-schema."""
    from jsonschema.validators import Draft202012Validator, validator_for

    validator = validator_for(schema, default=Draft202012Validator)(schema, registry=with_standards(schema)[1])
    return lambda text: bool(validator.is_valid(json.loads(text, parse_constant=_no_number)))


def with_standards(schema: Any) -> tuple[Any, Any]:
    """A JSON Schema as a resource, and a registry of it and of the standard meta-schemas."""
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    resource = Resource.from_contents(schema, default_specification=DRAFT202012)
    return resource, REGISTRY.with_resource(resource.id() or "", resource)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


KINDS: dict[str, Callable[[Any], Callable[..., bool]]] = {"math": _math, "regex": _regex, "json_schema": _json_schema}


def main() -> None:
    """Read the kind and its options, then questions, a line of JSON each; answer each with one. What cannot be answered
    (too deep, too large a number) is answered with false."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    kind, options = json.loads(sys.stdin.readline())
    answer = KINDS[kind](options)
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            value = answer(*question)
        except Exception:
            value = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(value), flush=True)
