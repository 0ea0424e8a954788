"""Which characters of a rendered chat the model must emit.

Three sources are compared for every row: the text that the generation prompt supplies and the rendering of the chat
up to a turn (prefix), the message that the template was writing (`chat_render`), and private markers around the
strings (`chat_markers`). Where they do not settle a turn the row is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from data_prep.chat_markers import Field, locate
from data_prep.chat_render import ChatTemplate, Message, Rendered, normalise
from recipes.errors import DataError

Strategy = Literal["generation tags", "prefix", "markers"]
LAST_ONLY = "set data.train_on: last"


@dataclass(frozen=True)
class Turn:
    """The trained characters `[start, end)` of one assistant turn.

    Args:
        message: index of the message.
        end_of_turn: the special tokens at the end of the span; `last_token` is the last of them.
        rewritten: the template shows the turn differently when it is the last one.
        strategy: what proved the span.
    """

    message: int
    start: int
    end: int
    end_of_turn: str
    last_token: str
    rewritten: bool
    strategy: Strategy


class Spans:
    """Finds the trained spans of chats under one template.

    Args:
        template: the compiled template.
        special_tokens: every special token of the tokenizer, as text.
        eos_token: the one that ends generation by default.
    """

    def __init__(self, template: ChatTemplate, special_tokens: Sequence[str], eos_token: str | None) -> None:
        self.template = template
        self._special = tuple(sorted((t for t in special_tokens if t.strip()), key=len, reverse=True))
        self._eos = eos_token

    def find(
        self, messages: Sequence[Message], tools: list[Any] | None, train_on: Literal["all", "last"]
    ) -> tuple[str, list[Turn]]:
        """Render the chat and give its trained turns.

        Raises:
            DataError: no assistant turn, or a turn whose trained text cannot be proven.
        """
        return self.derive(messages, tools, train_on)[:2]

    def derive(
        self, messages: Sequence[Message], tools: list[Any] | None, train_on: Literal["all", "last"]
    ) -> tuple[str, list[Turn], list[Field] | None]:
        """As `find`; also where the strings of the messages stand, as `chat_markers.locate` found them."""
        ready = normalise(messages)
        wanted = [index for index, message in enumerate(ready) if message.get("role") == "assistant"]
        if not wanted:
            raise DataError("the chat has no assistant turn, so nothing would be trained")
        full = self.template.render(ready, tools)
        fields = locate(self.template, messages, tools, full)
        row = _Row(self, ready, tools, full, fields)
        turns = [row.turn(index) for index in (wanted if train_on == "all" else wanted[-1:])]
        row.check_others(turns)
        return full.text, self._within_tags(full, turns) if self.template.has_tags else turns, fields

    def closing(self, text: str) -> tuple[int, str] | None:
        """End (offset into `text`) and text of the special tokens that close it, without white space after them.

        Of several in a row (`<|end_response|><|end_of_turn|>`) all are emitted, up to the one that ends generation.
        """
        begin = end = len(text.rstrip())
        ends: list[int] = []
        while token := self._last_special(text[:begin]):
            if token == self._eos:
                ends.clear()
            ends.append(begin)
            begin = len(text[: begin - len(token)].rstrip())
            first = text.index(token, begin)
        if not ends:
            return None
        end = max(ends)
        return end, text[first:end]

    def last_token(self, closing: str) -> str:
        """The last special token of a closing run."""
        return self._last_special(closing) or closing

    def _last_special(self, text: str) -> str | None:
        if not text.endswith(self._special):
            return None
        return next(token for token in self._special if text.endswith(token))

    def _within_tags(self, full: Rendered, turns: list[Turn]) -> list[Turn]:
        """Check the template's own generation tags against the derived turns. The tags may train less at the start
        of a turn (an author's choice), never more, and must include the end of the turn."""
        found = []
        for turn in turns:
            inside = [(start, end) for start, end in full.tags if start < turn.end and end > turn.start]
            where = f"turn {turn.message} (assistant)"
            if not inside:
                raise DataError(f"{where}: the generation tags of the chat template mark nothing")
            if inside[0][0] < turn.start:
                supplied = full.text[inside[0][0] : turn.start]
                raise DataError(f"{where}: the generation tags include {supplied!r}, which the prompt already supplies")
            if inside[-1][1] < turn.end:
                raise DataError(
                    f"{where}: the generation tags leave out the end-of-turn token {turn.end_of_turn!r}, so the model "
                    "would not learn to stop",
                    remedy="move {% endgeneration %} behind that token",
                )
            found += [
                replace(turn, start=start, end=min(end, turn.end), strategy="generation tags") for start, end in inside
            ]
        return found


class _Row:
    """One chat while its spans are worked out."""

    def __init__(
        self,
        spans: Spans,
        messages: list[Message],
        tools: list[Any] | None,
        full: Rendered,
        fields: list[Field] | None,
    ) -> None:
        self.spans, self.messages, self.tools, self.full, self.fields = spans, messages, tools, full, fields

    def turn(self, index: int) -> Turn:
        where = f"turn {index} (assistant)"
        region_start, region_end = self._region(index)
        start, by_prefix = self._start(index, region_start, region_end)
        closed = self.spans.closing(self.full.text[start:region_end])
        if closed is None:
            shown = self.full.text[start:region_end][-30:]
            raise DataError(
                f"{where}: the chat template writes no end-of-turn token after the turn (it ends in {shown!r}), so "
                "where generation must stop is not defined"
            )
        end, token = start + closed[0], closed[1]
        self._check_stops(index, start, end - len(token), token)
        rewritten = self._rewritten(index, start, end, token)
        self._check_fields(index, start, end - len(token))
        if self.fields is None and (rewritten or not by_prefix):
            raise DataError(
                f"{where}: the chat template rewrites the turn and reacts to markers, so its text cannot be traced",
                remedy=LAST_ONLY,
            )
        last = self.spans.last_token(token)
        return Turn(index, start, end, token, last, rewritten, "prefix" if by_prefix else "markers")

    def _check_stops(self, index: int, start: int, end: int, token: str) -> None:
        """The token that ends generation must not stand earlier in the turn: generation would never get past it."""
        last = self.spans.last_token(token)
        at = self.full.text.find(last, start, end)
        if at < 0:
            return
        owner = next((f.kind for f in self.fields or [] for a, b in f.spans if a <= at < b), None)
        who = f"its {owner} contains" if owner else "the chat template writes"
        raise DataError(
            f"turn {index} (assistant): {who} the end-of-turn token {last!r} before the end of the turn, so the model "
            "would learn to stop there"
        )

    def _region(self, index: int) -> tuple[int, int]:
        spans = self.full.regions.get(index, [])
        if len(spans) == 1:
            return spans[0]
        how = "writes nothing for it" if not spans else "writes it in several places"
        raise DataError(f"turn {index} (assistant): the chat template {how}, so its text cannot be told apart")

    def _start(self, index: int, region_start: int, region_end: int) -> tuple[int, bool]:
        """Where generation begins: after the prompt, by prefix where it holds, else by what the prompt adds."""
        if index == 0:
            raise DataError(f"turn {index} (assistant): the chat begins with an assistant turn, so it has no prompt")
        before = self.messages[:index]
        prompt = self.spans.template.render(before, self.tools, prompt=True)
        start = len(prompt.text)
        if self.full.text.startswith(prompt.text) and region_start <= start <= region_end:
            return start, True
        supplied = self._supplied(before, prompt)
        text = self.full.text[region_start:region_end]
        if supplied is not None and text.startswith(supplied):
            return region_start + len(supplied), False
        last = index == len(self.messages) - 1
        raise DataError(
            f"turn {index} (assistant): the generation prompt supplies {(supplied or prompt.text)[-60:]!r}, but the "
            f"chat template renders the turn as {text[:40]!r}, a context that generation never has",
            remedy="give the turn the reasoning that its prompt opens, or switch thinking off for the template"
            if last and "think" in (supplied or "").lower()
            else None
            if last
            else LAST_ONLY,
        )

    def _supplied(self, before: list[Message], prompt: Rendered) -> str | None:
        """The text that the generation prompt adds to the chat before the turn."""
        written = max((end for spans in prompt.regions.values() for _, end in spans), default=0)
        if prompt.text[written:]:
            return prompt.text[written:]
        plain = self.spans.template.render(before, self.tools).text
        return prompt.text[len(plain) :] if prompt.text.startswith(plain) else None

    def _rewritten(self, index: int, start: int, end: int, token: str) -> bool:
        """Compare the turn with its rendering as the last one, which is what the model emits at that point."""
        if index == len(self.messages) - 1:
            return False
        alone = self.spans.template.render(self.messages[: index + 1], self.tools)
        region = alone.regions.get(index, [])
        closed = self.spans.closing(alone.text[: region[-1][1]]) if region else None
        if closed is None or not closed[1].startswith(token):
            raise DataError(
                f"turn {index} (assistant): the chat template ends the turn with {token!r}, but the same turn as the "
                f"last one with {closed[1] if closed else 'no end-of-turn token'!r}, which is what ends generation",
                remedy=LAST_ONLY if closed else None,
            )
        trained = self.full.text[start:end]
        return alone.text[: closed[0]] != self.full.text[:start] + trained

    def _check_fields(self, index: int, start: int, end: int) -> None:
        """The turn's own strings lie inside its span, before the end-of-turn token, and none was cut."""
        for field in self.fields or []:
            if field.message != index:
                continue
            if field.kind != "reasoning" and not field.spans:
                raise DataError(f"turn {index} (assistant): the chat template leaves out its {field.kind}")
            if any(first < start or last > end for first, last in field.spans):
                raise DataError(f"turn {index} (assistant): the {field.kind} is not inside the text of the turn")

    def check_others(self, turns: list[Turn]) -> None:
        """No string of another message lies inside a trained span, and what comes before the last span is complete."""
        for field in self.fields or []:
            role = self.messages[field.message].get("role")
            if field.kind != "reasoning" and not field.spans and field.message < turns[-1].message:
                raise DataError(f"turn {field.message} ({role}): the chat template leaves out its {field.kind}")
            for turn in turns:
                if field.message != turn.message and any(a < turn.end and b > turn.start for a, b in field.spans):
                    raise DataError(
                        f"turn {field.message} ({role}): the chat template writes it inside the assistant's turn "
                        f"{turn.message}"
                    )
