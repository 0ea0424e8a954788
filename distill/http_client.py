"""The endpoints of a teacher: how they are reached, what they take, how much. The asking itself is http_stream.py's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from distill.http_errors import REFUSED, Key, shown, words
from recipes.errors import EngineError

CONNECT = 20.0  # seconds for a connection, or for the list of models


@dataclass(frozen=True)
class Call:
    """One POST that is wanted.

    Attributes:
        key: names it in errors.
        body: None: nothing is asked, and the result is None.
        tokens: estimate of prompt and answer, for the limit.
        read: makes the result of a reply's JSON object, in the client's thread; raises Again where it is no answer.
        used: tokens that a result really took.
        about: whatever the caller wants to find again with the result.
    """

    key: str
    path: str
    body: dict[str, Any] | None
    tokens: int
    read: Callable[[dict[str, Any], float], Any]
    used: Callable[[Any], int] | None = None
    about: Any = None


class Bucket:
    """A rate limit: what flows in steadily may be taken, a second's worth of it at once. Who takes more than there is
    leaves a debt that the next ones wait for, so that on average the limit holds whatever the size."""

    def __init__(self, per_minute: float, now: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.now = per_minute / 60, now
        self.most = self.level = max(1.0, self.rate)
        self.at = now()

    def wait(self, amount: float) -> float:
        """Seconds until `amount` may be taken."""
        now = self.now()
        self.level = min(self.most, self.level + (now - self.at) * self.rate)
        self.at = now
        lacking = min(amount, self.most) - self.level
        return lacking / self.rate if lacking > 1e-6 else 0.0

    def take(self, amount: float) -> None:
        self.level -= amount


@dataclass
class Client:
    """Endpoints of one teacher, and what is known about them over several streams.

    Attributes:
        seconds: for one answer.
        watch: is told the address and the JSON object of every reply, before it is read; raises EngineError.
        listed: is told the address and the JSON object of every list of models; raises EngineError.
        prompts: what is sent, for errors: `messages` or `token ids`.
        optional: fields of a body that are left out once a server refuses them.
        notes: what befell the endpoints.
    """

    urls: tuple[str, ...]
    key: Key
    parallel: int
    seconds: float
    retries: int
    requests: Bucket | None = None
    tokens: Bucket | None = None
    watch: Callable[[str, dict[str, Any]], None] = lambda url, reply: None
    listed: Callable[[str, Any], None] = lambda url, listing: None
    prompts: str = "messages"
    optional: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    streams: set[Callable[[], None]] = field(default_factory=set, init=False)  # what ends each that is under way
    refused: set[str] = field(default_factory=set, init=False)
    renamed: bool = field(default=False, init=False)  # max_tokens is called max_completion_tokens

    def __post_init__(self) -> None:
        for library in ("httpx", "httpcore"):  # they log addresses and headers
            logger = logging.getLogger(library)
            logger.setLevel(max(logger.level, logging.WARNING))

    def close(self) -> None:
        """End the streams under way, from whatever thread: whoever waits for them gets an EngineError."""
        for end in list(self.streams):
            end()

    def list_models(self) -> None:
        """Ask every endpoint for its list of models, and tell `listed`.

        Raises:
            EngineError: not one endpoint answers, or `listed` raises.
        """
        reasons = []
        for url in self.urls:
            with httpx.Client(**self.settings(url)) as http:
                for pause in (0.5, 1.0, None):
                    try:
                        self.told(url, http.get(url + "/models"))
                        break
                    except httpx.HTTPError as error:
                        reason = f"{shown(url)}: {self.why(error)}"
                        if pause is None:
                            reasons.append(reason)
                            self.notes.append(f"{reason}; it is asked again while the others work")
                        else:
                            time.sleep(pause)
        if len(reasons) == len(self.urls):
            raise EngineError(f"no teacher answers ({'; '.join(reasons)})", None, "start the server, or correct urls")

    def told(self, url: str, response: httpx.Response) -> bool:
        """Whether an endpoint that was asked for its models is alive; passes the list on, where there is one."""
        if response.status_code == 200:
            try:
                listing = response.json()
            except ValueError:
                return True
            self.listed(url, listing)
        return response.status_code not in {502, 503, 504}  # a server without such a list is alive too

    def settings(self, url: str) -> dict[str, Any]:
        """Arguments of an httpx client."""
        local = urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"}  # no proxy leads there
        timeout = httpx.Timeout(CONNECT)
        return {"headers": self.key.headers, "timeout": timeout, "trust_env": not local, "follow_redirects": False}

    def why(self, error: BaseException) -> str:
        return words(str(error) or type(error).__name__, self.key, 160)

    def body(self, call: Call) -> dict[str, Any]:
        """The call's body without what servers refused."""
        body = {name: value for name, value in (call.body or {}).items() if name not in self.refused}
        if self.renamed and "max_tokens" in body:
            body["max_completion_tokens"] = body.pop("max_tokens")
        return body

    def adapts(self, status: int, text: str, sent: dict[str, Any]) -> bool:
        """Whether the next try will differ, because the server refused a field that can be left out or renamed."""
        if status not in REFUSED:
            return False
        if "max_tokens" in sent and "max_completion_tokens" in text:  # OpenAI's newer models
            self.renamed = True
            return True
        found = {name for name in self.optional if name in sent and name in text}
        self.refused |= found
        return bool(found)
