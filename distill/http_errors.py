"""What a failed request means: try again, or an error with its remedy. No text that leaves this file holds the key."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from pydantic import SecretStr

from recipes.errors import EngineError

OPTIONS = "teacher.engine.http"  # where the recipe says how the teacher is reached
LONGEST_HOLD = 120.0  # seconds, whatever Retry-After says
REFUSED = {400, 422}  # the request as it stands
_RETRIED = {408, 409, 425, 429}
_UNKNOWN_FIELD = re.compile(
    r"unexpected|unknown|unrecogni[sz]ed|unsupported|not supported|extra inputs|additional prop", re.I
)
_TOO_LONG = re.compile(
    r"context.{0,10}(length|window|size)|maximum.{0,20}length|max_model_len|prompt is too long", re.I
)
_NEVER = re.compile(r"insufficient_quota|billing", re.I)  # a 429 that no waiting ends


class Again(Exception):
    """A try that failed in a way that another one may not.

    Attributes:
        reason: what happened, in words.
        endpoint_ill: it speaks against the endpoint, not only against this request.
        lost: the connection failed: it may be another server that listens there next.
        hold: seconds for which the endpoint wants no requests; None where it does not say.
        busy: the endpoint is well and has too much to do.
    """

    def __init__(
        self,
        reason: str,
        *,
        endpoint_ill: bool = False,
        lost: bool = False,
        hold: float | None = None,
        busy: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason, self.endpoint_ill, self.lost, self.hold, self.busy = reason, endpoint_ill, lost, hold, busy


@dataclass(frozen=True)
class Key:
    """The key of the endpoints. It shows itself to nobody but the header.

    Attributes:
        variable: the environment variable that it came from.
    """

    variable: str | None = None
    value: SecretStr | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.value.get_secret_value()}"} if self.value else {}

    def hide(self, text: str) -> str:
        """`text` without the key, and without words that begin or end as it does: servers quote wrong keys in part."""
        if self.value is None:
            return text
        key = self.value.get_secret_value()
        text = text.replace(key, "***")
        if len(key) >= 16:
            ends = f"{re.escape(key[:6])}|{re.escape(key[-4:])}(?![\\w-])"
            text = re.sub(rf"[^\s'\"]*(?:{ends})[^\s'\"]*", "***", text)
        return text


def shown(url: str) -> str:
    """An address without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def words(text: str, key: Key, most: int = 300) -> str:
    """A server's own words: the message of its JSON error, or its text; on one line, shortened, without the key."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    for _ in range(3):
        if isinstance(found, dict):
            found = next((found[n] for n in ("error", "message", "detail", "msg") if found.get(n)), found)
    plain = found if isinstance(found, str) else json.dumps(found)
    plain = " ".join(key.hide(plain).split())
    return plain if len(plain) <= most else plain[: most - 3] + "..."


def failed(
    status: int, headers: Mapping[str, str], text: str, *, url: str, key: Key, request: str, prompts: str
) -> Again | EngineError:
    """What a reply with a status other than 200 means.

    Args:
        request: key of the request that it answers.
        prompts: what is sent, `messages` or `token ids`.
    """
    said = words(text, key)
    reason = f"HTTP {status}" + (f" ({said})" if said else "")
    if status in _RETRIED or status >= 500:
        if status == 429 and _NEVER.search(text):
            return EngineError(f"refuses: {reason}", shown(url), "see the account at the service")
        hold = _retry_after(headers)
        return Again(reason, endpoint_ill=status >= 500 and hold is None, hold=hold, busy=status == 429)
    if status in {*REFUSED, 413} and _TOO_LONG.search(text):
        return EngineError(
            f"request {request} is too long for the server: {reason}",
            shown(url),
            "drop long rows (data.steps), lower max_tokens, or serve the model with a longer context",
        )
    return EngineError(f"refuses request {request}: {reason}", shown(url), _remedy(status, text, key, prompts))


def _remedy(status: int, text: str, key: Key, prompts: str) -> str:
    if status == 401 and key.variable:
        return f"put a key that it takes into the environment variable {key.variable}"
    if status == 401:
        return f"name the environment variable that holds its key in {OPTIONS}.api_key_env"
    if status == 403:
        return "see whether the key may use this model"
    if status == 404 or 300 <= status < 400:
        return f"check {OPTIONS}.urls (bases, mostly ending in /v1) and served_as"
    if re.search(r"logprobs.*(max allowed|maximum)|max_logprobs", text):
        return "start the server with --max-logprobs of at least teacher.logits.k (vLLM), or lower teacher.logits.k"
    if prompts == "token ids" and re.search(r"prompt.{0,20}(string|str\b)", text):
        return f"it takes no token ids: set {OPTIONS}.api: chat"
    if status in REFUSED and _UNKNOWN_FIELD.search(text):
        return f"a field is left out by {OPTIONS}.extra_body: {{NAME: null}}"
    return "see the server's log"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, at most LONGEST_HOLD: a number or a date (RFC 9110, 10.2.3)."""
    asked = headers.get("retry-after", "")
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), LONGEST_HOLD) if math.isfinite(seconds) else None
