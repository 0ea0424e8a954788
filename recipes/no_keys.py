"""What keeps keys and passwords out of a recipe, which every manifest, report and model card copies.

A key is named, by the environment variable that holds it. What looks like a key itself is refused, by messages that do
not repeat it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from recipes.sections import Text

_REMEDY = "leave it out, and give the key by the environment (api_key_env names the variable)"
_NAMES_A_KEY = re.compile(
    r"apikey|authori[sz]ation|passw|secret|credential|bearer"
    r"|^(key|auth|token|cookie)$|(access|private|subscription|auth)key$"
    r"|(access|api|auth|bot|hf|hub|id|identity|refresh|session|user)token$"
)
_A_KEY_ITSELF = re.compile(r"(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,}")  # a long run of letters and digits, both at random


def _address(text: str) -> str:
    """The base of an endpoint. No message shows one that may hold a password."""
    if "@" in text:
        raise ValueError(f"an address with a user name or a password is not written down; {_REMEDY}")
    if "?" in text or "#" in text:
        raise ValueError("what follows ? or # belongs to no base of an endpoint; leave it out")
    try:
        parts = urlsplit(text)
        right = parts.scheme in {"http", "https"} and parts.hostname and not re.search(r"\s", text)
    except ValueError:  # a [ without its ]
        right = False
    if not right:
        raise ValueError(f"'{text}' is no address of an endpoint; such as http://127.0.0.1:8000/v1")
    return text.rstrip("/")


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) or _A_KEY_ITSELF.search(text):
        raise ValueError("must be the name of an environment variable, such as OPENAI_API_KEY; never the key itself")
    return text


def _without_keys(fields: dict[str, Any]) -> dict[str, Any]:
    for name in _named(fields):
        raise ValueError(f"'{name}' holds a key, which is not written down; {_REMEDY}")
    return fields


def _named(value: Any) -> Iterator[str]:
    """Names at any depth that hold a text and are those of keys. What holds no text (of a JSON schema, say) is none."""
    if isinstance(value, dict):
        for name, child in value.items():
            if isinstance(child, str) and child and _NAMES_A_KEY.search(re.sub(r"[^a-z0-9]", "", str(name).lower())):
                yield str(name)
            yield from _named(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _named(child)


Address = Annotated[Text, AfterValidator(_address)]
Variable = Annotated[Text, AfterValidator(_variable)]
Further = Annotated[dict[Text, Any], AfterValidator(_without_keys)]
