"""Chat rows to token ids with an exact loss mask.

Trained is what the model must emit in an assistant turn: reasoning (where the template renders it), content, tool
calls and the end-of-turn tokens. Not trained: role headers, anything the generation prompt supplies, white space
after the end-of-turn token, and every other turn. docs/chat-templates.md says how the spans are proven and which
templates are refused.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, Literal

from data_prep.chat_forms import Forms
from data_prep.chat_render import ChatTemplate, Message
from data_prep.chat_shapes import shapes
from data_prep.chat_spans import Spans, Turn
from recipes.errors import DataError


@dataclass(frozen=True)
class Masked:
    """Token ids of one row, with `mask[i]` True where the prediction of token i counts in the loss.

    `input_ids` and `mask` have the same length; `text` is the text the ids stand for.
    """

    input_ids: list[int]
    mask: list[bool]
    text: str


def mask_chat(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    tools: list[Any] | None = None,
    template: str | None = None,
    train_on: Literal["all", "last"] = "all",
    template_kwargs: Mapping[str, Any] | None = None,
) -> Masked:
    """Token ids and loss mask of a chat.

    Args:
        messages: `{"role", "content", "reasoning_content"?, "tool_calls"?}` each.
        tokenizer: a transformers tokenizer, fast or slow.
        tools: JSON schemas for the template.
        template: a Jinja chat template instead of the tokenizer's own.
        train_on: every assistant turn, or the last one alone.
        template_kwargs: settings that the template reads (`enable_thinking`); generation must use the same ones.

    Raises:
        DataError: the mask would be empty or cannot be proven; the message names the turn and the reason.
    """
    _check_messages(messages)
    text, turns = _forms(tokenizer, template, tools, template_kwargs).find(messages, tools, train_on)
    return _masked(text, turns, *_tokenise(text, turns, tokenizer), tokenizer)


def mask_chats(
    chats: Sequence[Sequence[Message]],
    tokenizer: Any,
    *,
    tools: Sequence[list[Any] | None],
    train_on: Literal["all", "last"] = "all",
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Masked | DataError]:
    """As `mask_chat` of each chat, tokenised together; a chat that is refused gives its error in its place."""
    made: list[Masked | DataError] = []
    rendered: list[tuple[int, str, list[Turn]]] = []
    for messages, own_tools in zip(chats, tools, strict=True):
        try:
            _check_messages(messages)
            found = _forms(tokenizer, None, own_tools, template_kwargs).find(messages, own_tools, train_on)
            rendered.append((len(made), *found))
            made.append(DataError("is not tokenised"))
        except DataError as error:
            made.append(error)
    encodings = _encodings([text for _, text, _ in rendered], tokenizer)
    for (place, text, turns), encoding in zip(rendered, encodings, strict=True):
        borders = _quick_borders(text, turns, encoding) if encoding is not None else None
        try:
            ids, borders = (encoding.ids, borders) if borders else _tokenise(text, turns, tokenizer)
            made[place] = _masked(text, turns, ids, borders, tokenizer)
        except DataError as error:
            made[place] = error
    return made


def _encodings(texts: list[str], tokenizer: Any) -> Sequence[Any]:
    """The tokenizer library's own encodings of all texts at once; Nones of a slow tokenizer."""
    if not texts or not tokenizer.is_fast:
        return [None] * len(texts)
    # The call readies the library's tokenizer (neither padding nor truncation), which then spares a copy of each row.
    first = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    encodings: Sequence[Any] = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return encodings if encodings[0].ids == list(first) else [None] * len(texts)


def _quick_borders(text: str, turns: Sequence[Turn], encoding: Any) -> list[tuple[int, int]] | None:
    """Token ranges of the turns where two tokens of one character or more meet at every border; None says nothing."""

    def border(position: int) -> int | None:
        count = len(encoding.ids)
        index = count if position == len(text) else encoding.char_to_token(position)
        if not index or (index < count and encoding.token_to_chars(index)[0] != position):
            return None
        first, last = encoding.token_to_chars(index - 1)
        return index if last == position and first < position else None

    found = [(border(turn.start), border(turn.end)) for turn in turns]
    proven = [(first, last) for first, last in found if first is not None and last is not None]
    return proven if len(proven) == len(turns) else None


def _masked(text: str, turns: Sequence[Turn], ids: list[int], borders: list[tuple[int, int]], tokenizer: Any) -> Masked:
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise DataError(f"the text begins with two {tokenizer.bos_token!r}; leave one out of the template or the row")
    mask = [False] * len(ids)
    for first, last in borders:
        if first == last:
            raise DataError("an assistant turn has no token")
        mask[first:last] = [True] * (last - first)
    return Masked(ids, mask, text)


def mask_text(text: str, tokenizer: Any) -> Masked:
    """Plain text for continued pretraining: every token trained, the end token once, the begin token if the tokenizer
    adds one (not trained: nothing predicts it).

    Raises:
        DataError: the text is empty or the tokenizer has no end token.
    """
    if not text.strip():
        raise DataError("the text is empty")
    bos, ids, eos = _plain(text, tokenizer)
    return Masked([*bos, *ids, eos], [False] * len(bos) + [True] * (len(ids) + 1), text)


def mask_prompt(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    tools: list[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Masked:
    """A prompt as the model reads it when it is asked: with the generation prompt, nothing trained.

    Raises:
        DataError: the template refuses the messages.
    """
    _check_messages(messages)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=True, tokenize=False, **dict(template_kwargs or {})
        )
    except Exception as error:  # jinja's own errors, and those that a template raises
        raise DataError(f"the chat template refuses the prompt: {' '.join(str(error).split())[:160]}") from None
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Masked(ids, [False] * len(ids), text)


def mask_completion(prompt: str, completion: str, tokenizer: Any) -> Masked:
    """Prompt and completion for a tokenizer without chat template: completion and end token trained.

    The prompt is tokenised alone, as it is at inference; the completion's ids follow it.

    Raises:
        DataError: the completion is empty, the tokenizer has no end token, or the ids do not decode to the text.
    """
    if not completion:
        raise DataError("the completion is empty, so nothing would be trained")
    bos, whole, eos = _plain(prompt + completion, tokenizer)
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    if whole[: len(head)] != head or len(whole) <= len(head):
        raise DataError(
            f"a token straddles the border between prompt and completion ({prompt[-10:]!r} | {completion[:10]!r})",
            remedy="end the prompt with a line break, or begin the completion with the space",
        )
    mask = [False] * (len(bos) + len(head)) + [True] * (len(whole) - len(head) + 1)
    return Masked([*bos, *whole, eos], mask, prompt + completion)


def pieces(masked: Masked, tokenizer: Any) -> list[tuple[str, bool]]:
    """Consecutive runs of tokens with the same mask, decoded, for display."""
    runs: list[tuple[list[int], bool]] = []
    for token, trained in zip(masked.input_ids, masked.mask, strict=True):
        if runs and runs[-1][1] == trained:
            runs[-1][0].append(token)
        else:
            runs.append(([token], trained))
    return [
        (tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), trained)
        for ids, trained in runs
    ]


@dataclass(frozen=True)
class Finding:
    """What a chat template does with one shape of chat.

    Args:
        shape: a key of `chat_shapes.shapes`.
        strategy: what proved the mask of its turns, or "refused".
        train_on: the widest setting that is accepted, None when refused.
        end_of_turn: the special tokens that end a turn.
        rewritten: an earlier turn, or what stands before it, is rendered otherwise than when it was the last one.
        reasoning: the reasoning of the last turn is trained.
        empty_tools: the template fails without a list of tools, and an empty one was given.
        reason: why it is refused, or why `train_on: all` is.
    """

    shape: str
    strategy: Literal["generation tags", "prefix", "markers", "refused"]
    train_on: Literal["all", "last"] | None = None
    end_of_turn: str = ""
    rewritten: bool = False
    reasoning: bool = False
    empty_tools: bool = False
    reason: str = ""


def check_template(
    tokenizer: Any, template: str | None = None, *, template_kwargs: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Mask small chats of every shape and check each mask once more by changing words.

    Other user, system and tool text must leave the trained text as it is; other assistant text must leave the rest.
    """
    return [_check_shape(shape, tokenizer, template, template_kwargs) for shape in shapes()]


def _check_shape(shape: str, tokenizer: Any, template: str | None, kwargs: Mapping[str, Any] | None) -> Finding:
    messages, tools = shapes()[shape]
    reason, empty = "", False
    modes: tuple[Literal["all"], Literal["last"]] = ("all", "last")
    choices: list[list[Any] | None] = [tools] if tools else [None, []]
    for train_on, given in product(modes, choices):
        try:
            text, turns = _spans(tokenizer, template, given, kwargs).find(messages, given, train_on)
            mask_chat(messages, tokenizer, tools=given, template=template, train_on=train_on, template_kwargs=kwargs)
        except DataError as error:
            reason = reason or str(error)
            continue
        empty = given == []
        wrong = _changes(shape, tokenizer, template, given, train_on, kwargs)
        if wrong:
            return Finding(shape, "refused", reason=wrong)
        thoughts = messages[-1].get("reasoning_content") or ""
        return Finding(
            shape,
            "markers" if any(turn.strategy == "markers" for turn in turns) else turns[0].strategy,
            train_on,
            turns[-1].end_of_turn,
            any(turn.rewritten for turn in turns),
            bool(thoughts) and any(thoughts in text[turn.start : turn.end] for turn in turns),
            empty,
            "" if train_on == "all" else reason,
        )
    return Finding(shape, "refused", reason=reason)


def _changes(
    shape: str,
    tokenizer: Any,
    template: str | None,
    tools: list[Any] | None,
    train_on: Literal["all", "last"],
    kwargs: Mapping[str, Any] | None,
) -> str:
    """What is wrong with the split into trained text and rest, seen from changed words; empty if nothing is."""
    split = []
    for words in ({}, {"asked": "Und welches von"}, {"answered": "Es ist wohl das"}):
        text, turns = _spans(tokenizer, template, tools, kwargs).find(shapes(**words)[shape][0], tools, train_on)
        cuts = [0, *(cut for turn in turns for cut in (turn.start, turn.end)), len(text)]
        parts = [text[begin:end] for begin, end in pairwise(cuts)]
        split.append((parts[1::2], parts[::2]))
    (trained, rest), (trained_asked, _), (trained_answered, rest_answered) = split
    if trained != trained_asked:
        return "the trained text changes with what the user says"
    if train_on == "all" and rest != rest_answered:
        return "the text that is not trained changes with what the assistant says"
    return "" if trained != trained_answered else "the trained text does not change with what the assistant says"


def _plain(text: str, tokenizer: Any) -> tuple[list[int], list[int], int]:
    """Begin token (if the tokenizer adds one), ids of the text without a trailing end token, end token."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end-of-text token, so the end of a text cannot be trained")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids and ids[-1] == eos:
        ids.pop()
    adds_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return ([bos] if adds_bos and ids[:1] != [bos] else []), ids, eos


def _check_messages(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"turn {index} is not a message with a role")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise DataError(f"turn {index} ({message['role']}): the content is a {type(content).__name__}, not text")
        for part in content if isinstance(content, list) else []:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise DataError(f"turn {index} ({message['role']}): only text parts can be trained on")


def _spans(
    tokenizer: Any, template: str | None, tools: list[Any] | None, kwargs: Mapping[str, Any] | None = None
) -> Spans:
    return _forms(tokenizer, template, tools, kwargs).spans


def _forms(
    tokenizer: Any, template: str | None, tools: list[Any] | None, kwargs: Mapping[str, Any] | None = None
) -> Forms:
    if template is None or "{" not in template:
        try:
            template = tokenizer.get_chat_template(template, tools)
        except ValueError as error:
            raise DataError("the tokenizer has no chat template", remedy="set data.chat_template") from error
    settings = json.dumps(dict(kwargs), sort_keys=True) if kwargs else "{}"
    return _compiled(tokenizer, template, settings, len(tokenizer), tokenizer.bos_token, tokenizer.eos_token)


@lru_cache(maxsize=8)
def _compiled(tokenizer: Any, template: str, settings: str, *_key: object) -> Forms:
    """One analysis per tokenizer, template and settings; `_key` holds what may change about a tokenizer."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    variables = {**tokenizer.special_tokens_map, **json.loads(settings)}
    tokens = sorted(special | set(tokenizer.all_special_tokens))
    return Forms(Spans(ChatTemplate(template, variables), tokens, tokenizer.eos_token), tokens)


def _tokenise(text: str, turns: list[Turn], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of the whole text and the token ranges of the turns, each border proven to fall between two tokens."""
    if tokenizer.is_fast:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        starts = [start for start, _ in offsets]
        if starts == sorted(starts):
            found = [(_border(t.start, starts, offsets), _closing_border(t, text, starts, offsets)) for t in turns]
            proven = [(first, last) for first, last in found if first is not None and last is not None]
            if len(proven) == len(turns):
                return ids, proven
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, _by_pieces(text, turns, tokenizer, ids)


def _border(position: int, starts: list[int], offsets: list[tuple[int, int]]) -> int | None:
    """Index of the token that begins at a character, if the token before it ends exactly there. Tokenizers that trim
    white space from offsets leave a gap or a token without width there, which proves nothing: None."""
    index = bisect_left(starts, position)
    if index < len(offsets) and (offsets[index][0] != position or offsets[index][1] == position):
        return None
    before = offsets[index - 1] if index else (-1, 0)
    return index if before[1] == position and before[0] < position else None


def _closing_border(turn: Turn, text: str, starts: list[int], offsets: list[tuple[int, int]]) -> int | None:
    """As `_border` for the end of a turn. An end-of-turn token may take in the white space that follows it
    (`rstrip` of an added token): it is the same token, so the border is behind it."""
    index = bisect_left(starts, turn.end)
    if index and offsets[index - 1][1] > turn.end and text[turn.end : offsets[index - 1][1]].isspace():
        begins = turn.end - len(turn.last_token)
        return index if offsets[index - 1][0] == begins else None
    return _border(turn.end, starts, offsets)


def _by_pieces(text: str, turns: list[Turn], tokenizer: Any, ids: list[int]) -> list[tuple[int, int]]:
    """Tokenise the text cut at the turns' borders; only if that gives the ids of the whole are the borders proven."""
    cuts = sorted({0, len(text), *(t.start for t in turns), *(t.end for t in turns)})
    counts = {0: 0}
    joined: list[int] = []
    for begin, end in pairwise(cuts):
        joined += tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
        counts[end] = len(joined)
    if joined != ids:
        same = next(
            (n for n, (a, b) in enumerate(zip(joined, ids, strict=False)) if a != b), min(len(joined), len(ids))
        )
        cut = next((end for end in cuts[1:-1] if counts[end] > same), cuts[-1])
        turn = min(turns, key=lambda t: min(abs(t.start - cut), abs(t.end - cut)))
        raise DataError(
            f"turn {turn.message} (assistant): a token straddles the border between what is given and what is trained, "
            f"{text[max(0, cut - 20) : cut]!r} | {text[cut : cut + 20]!r}, so no mask is exact",
            remedy="strip the white space there, or give the turn the reasoning that its prompt opens",
        )
    return [(counts[t.start], counts[t.end]) for t in turns]
