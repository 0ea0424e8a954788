"""Which model it is that speaks. It must stay the same, under way and from one session to the next: a server that comes
back after a crash with other weights under the same name would mix the answers of two teachers in one journal.

A server whose weights are changed in place, with no word of it in its list of models or its replies, cannot be told
from the one before. Asking it again what it answered once would not do: servers that batch round differently from one
moment to the next, so a long greedy answer differs by itself.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.http_errors import OPTIONS, shown
from recipes.errors import EngineError
from recipes.lineage import read_object, sha256_json, write_atomic

SERVED = "served.json"  # in a run's teacher/: what the servers said that they serve


class Watch:
    """What the servers say that they are, which must stay.

    Args:
        served: the name that is asked for.
        hosted: whether a service serves it. Its fingerprints tell its machines apart and are not watched.
        memory: the file that keeps what was said for later sessions; None: nothing outlives this one.
        identity: of the teacher; what is said of another one lies in the same file and does not count.
    """

    def __init__(
        self, served: str, hosted: bool, memory: Path | None = None, identity: Mapping[str, Any] | None = None
    ) -> None:
        self.served, self.hosted = served, hosted
        self.said: dict[tuple[str, str], str] = {}  # (address, or "" for all; what) -> what it said first
        self.memory, self.whose, self.unwritten = memory, sha256_json(dict(identity or {})), False
        self.earlier = self._remembered()

    def reply(self, url: str, reply: dict[str, Any]) -> None:
        """
        Raises:
            EngineError: a reply comes from another model than the first one, or than those of an earlier session.
            RetortError: what it says cannot be written down.
        """
        self._stays("", "model", reply.get("model"), url)
        if not self.hosted:
            self._stays(url, "system_fingerprint", reply.get("system_fingerprint"), url)
        if self.unwritten:  # not before: who only lists its models has answered nothing yet
            self._remember()

    def listing(self, url: str, listing: Any) -> None:
        """
        Raises:
            EngineError: the list of models lacks the one that is asked for, or it is another than before.
        """
        entries = listing.get("data", listing.get("models")) if isinstance(listing, dict) else listing
        entries = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
        by_name = {name: e for e in entries if isinstance(name := e.get("id", e.get("name")), str)}
        if not by_name or all(_loads_on_demand(name, entry) for name, entry in by_name.items()):
            return
        aliases = (self.served, f"{self.served}:latest", f"models/{self.served}")  # Ollama's, Google's
        entry = next((by_name[name] for name in aliases if name in by_name), None)
        if entry is None:
            names = sorted(by_name)
            close = difflib.get_close_matches(self.served, names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"it serves {', '.join(names[:8])}"
            more = f" and {len(names) - 8} more" if len(names) > 8 and not close else ""
            raise EngineError(
                f"does not serve '{self.served}' ({hint}{more})", shown(url), f"set {OPTIONS}.served_as to its name"
            )
        for what in ("root", "max_model_len"):
            self._stays(url, what, entry.get(what), url)

    def _stays(self, whose: str, what: str, value: Any, url: str) -> None:
        if value is None:
            return
        if (whose, what) not in self.said:
            self._as_earlier(what, str(value), url)
            self.unwritten = True
        first = self.said.setdefault((whose, what), str(value))
        if first != str(value):
            raise EngineError(
                f"the server is another one than before: {what} was '{first}' and is '{value}'",
                shown(url),
                "serve one model under one name during a run; answers of two teachers must not be mixed",
            )

    def _as_earlier(self, what: str, value: str, url: str) -> None:
        """Refuse what no server said in earlier sessions. At any address: a cluster gives new ones every time."""
        known = self.earlier.get(what, [])
        if known and value not in known:
            was = " or ".join(f"'{one}'" for one in known)
            raise EngineError(
                f"the server is another one than in an earlier session: {what} was {was} and is '{value}'",
                shown(url),
                f"serve what was served then; where the weights are the same, remove {self.memory}",
            )

    def _remembered(self) -> dict[str, list[str]]:
        """What was said of this teacher until now, by any session and shard: name of the fact -> values."""
        if self.memory is None:
            return {}
        found = read_object(self.memory).get(self.whose)
        found = found if isinstance(found, dict) else {}
        return {what: [str(value) for value in values] for what, values in found.items() if isinstance(values, list)}

    def _remember(self) -> None:
        """Add what was said to the file. It is on the disk before the answer that said it is in the journal. Of two
        shards that write at once one may be lost; the next session says it again."""
        self.unwritten = False
        if self.memory is None:
            return
        known = self._remembered()
        all_said = dict(known)
        for (_, what), value in self.said.items():
            all_said[what] = sorted({*all_said.get(what, []), value})
        if all_said != known:
            content = {**read_object(self.memory), self.whose: all_said}
            write_atomic(self.memory, json.dumps(content, indent=2) + "\n")


def _loads_on_demand(name: str, entry: dict[str, Any]) -> bool:
    """transformers serve lists what is in its cache, with the namespace as owner, and serves anything else too."""
    return "owned_by" in entry and entry["owned_by"] == (name.split("/")[0] if "/" in name else "")
