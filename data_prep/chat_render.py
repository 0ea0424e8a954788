"""Render a chat template and know which characters came from which message.

A compiled copy of the template tells, at every pass of a `for` loop over the messages, which message is being
rendered; nothing else in the template changes, so the text is the one `apply_chat_template` gives (a test compares
them). Text is attributed to a message by the identity of its dict, never by searching for its content.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from recipes.errors import DataError

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Rendered:
    """One rendering. All positions are character offsets into `text`.

    Args:
        text: what the template wrote.
        regions: for each message the spans it wrote, in order; empty spans are left out.
        tags: the spans inside `{% generation %}` tags.
    """

    text: str
    regions: dict[int, list[tuple[int, int]]]
    tags: list[tuple[int, int]]


class _Tracker:
    """Collects which message owns the text that is being written. One per rendering."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self._index = {id(message): index for index, message in enumerate(messages)}
        self._stack: list[int | None] = [None]
        self.events: list[tuple[int, int | None]] = [(0, None)]
        self.written = 0

    def push(self) -> None:
        self._stack.append(self._stack[-1])

    def enter(self, value: object) -> None:
        if isinstance(value, dict) and id(value) in self._index:
            self._stack[-1] = self._index[id(value)]
            self.events.append((self.written, self._stack[-1]))

    def pop(self) -> None:
        self._stack.pop()
        self.events.append((self.written, self._stack[-1]))

    def regions(self) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        ends = [position for position, _ in self.events[1:]] + [self.written]
        for (start, owner), end in zip(self.events, ends, strict=True):
            if owner is None or start == end:
                continue
            spans = found.setdefault(owner, [])
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        return found


def _call(name: str, *args: nodes.Expr) -> nodes.ExprStmt:
    return nodes.ExprStmt(nodes.Call(nodes.Name(name, "load"), list(args), [], None, None))


def _track_loops(node: nodes.Node) -> None:
    """Add the tracker's calls around and inside every `for` loop with a single loop variable, in place."""
    for field, value in node.iter_fields():
        if not isinstance(value, list):
            if isinstance(value, nodes.Node):
                _track_loops(value)
            continue
        new: list[Any] = []
        for child in value:
            if isinstance(child, nodes.Node):
                _track_loops(child)
            if isinstance(child, nodes.For) and isinstance(child.target, nodes.Name):
                child.body.insert(0, _call("retort_enter", nodes.Name(child.target.name, "load")))
                new += [_call("retort_push"), child, _call("retort_pop")]
            else:
                new.append(child)
        setattr(node, field, new)


class ChatTemplate:
    """A chat template compiled once, with the special tokens it may write.

    Args:
        source: the Jinja source.
        variables: what the template may read by name: `tokenizer.special_tokens_map` and the recipe's own settings.
    """

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        try:
            self._untracked = _compile_jinja_template(source)
            self._env = self._untracked.environment
            tree = self._env.parse(source)
        except TemplateError as error:
            raise DataError(f"the chat template does not parse: {error}") from error
        _track_loops(tree)
        tree.set_environment(self._env)
        for node in tree.find_all(nodes.Node):
            node.lineno = getattr(node, "lineno", None) or 1
        code = self._env.compile(tree)
        self._template = jinja2.Template.from_code(self._env, code, self._env.make_globals(None))
        self._variables = variables
        self._globals = dict(self._untracked.globals)
        # One clock per template, so that two renderings of a row cannot differ by the second between them.
        self._now = datetime.now()
        self.has_tags = any(node.name == "_generation_support" for node in tree.find_all(nodes.ExtensionAttribute))

    def render(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool = False) -> Rendered:
        """Render messages that `normalise` has prepared; `prompt` adds the generation prompt.

        Raises:
            DataError: the template refuses the messages or fails on them; its own message is in the error.
        """
        tracker = _Tracker(messages)
        blocks: list[str] = []
        tags: list[tuple[int, int]] = []
        try:
            for block in self._stream(messages, tools, prompt, tracker, blocks, tags):
                blocks.append(block)
                tracker.written += len(block)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            what = "refuses" if isinstance(error, TemplateError) else "fails on"
            remedy = None
            if tools is None and "NoneType" in str(error):
                remedy = "this template may need a list of tools; give it one, if only an empty one"
            elif isinstance(error, jinja2.UndefinedError):
                remedy = "it may read a setting that the recipe does not give"
            raise DataError(f"the chat template {what} the messages: {error}", remedy=remedy) from error
        return Rendered("".join(blocks), tracker.regions(), tags)

    def plain(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        """The text of a rendering without tools, and nothing about it; None where the template fails."""
        # As `Template.render`, which looks the globals up one by one for every row.
        template, values = self._untracked, self._globals | self._values(messages, None, prompt)
        context = self._env.context_class(self._env, values, template.name, template.blocks, self._globals)
        try:
            return "".join(template.root_render_func(context))
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError):
            return None

    def _values(self, messages: Sequence[Message], tools: Any, prompt: bool) -> dict[str, Any]:
        return {
            **self._variables,
            "messages": list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
            "strftime_now": self._now.strftime,
        }

    def _stream(
        self, messages: Sequence[Message], tools: Any, prompt: bool, tracker: _Tracker, blocks: list, tags: list
    ) -> Iterator[str]:
        track = {"retort_push": tracker.push, "retort_enter": tracker.enter, "retort_pop": tracker.pop}
        variables = {**self._values(messages, tools, prompt), **track}
        if not self.has_tags:
            yield from self._template.generate(variables)
            return
        with self._env.activate_tracker(blocks, tags):
            yield from self._template.generate(variables)


def normalise(messages: Sequence[Message]) -> list[Message]:
    """Copy messages as `apply_chat_template` passes them on: keys that are None left out, reasoning under both names
    that templates read."""
    copies = []
    for message in messages:
        copy = {key: value for key, value in message.items() if value is not None}
        reasoning = next((copy[key] for key in REASONING_FIELDS if key in copy), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        copies.append(copy)
    return copies
