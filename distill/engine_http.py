"""The teacher behind OpenAI-compatible servers.

Chat requests go to `/chat/completions` as messages, which the server renders; with `api: completions` they go to
`/completions` as the token ids that Retort rendered itself. Fields that OpenAI does not know are sent only when the
recipe sets them. vLLM is asked for the token ids of its answers; a server that refuses to be asked is not asked again.

A server may be restarted with another model while it is asked, or between two sessions. Every reply names its model,
and some name the state of the server (`system_fingerprint`); what the first reply said must stay (http_watch.py). The
fingerprint of a hosted service tells its machines apart, not its models, and is left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import SecretStr

from data_prep.completions import TAGS, completion_text
from data_prep.identity import model_identity
from data_prep.logit_cache import Sparse, scored_positions
from distill.http_client import Bucket, Call, Client
from distill.http_errors import OPTIONS, Key, shown
from distill.http_replies import Reply, read_answer, read_scores
from distill.http_stream import stream
from distill.http_watch import Watch
from distill.teachers import CUT, ENDED, Completion, Request
from recipes.errors import EngineError, RecipeError
from recipes.evidence import served_name
from recipes.names import host_at, host_named
from recipes.schema import Recipe
from recipes.schema_teacher import HttpEngine

_OURS = {
    "model",
    "messages",
    "prompt",
    "tools",
    "n",
    "stream",
    "max_tokens",
    "max_completion_tokens",
    "prompt_logprobs",
}
_SEEDS = 2**31  # llama.cpp and others read the seed as 32 bits


class HttpTeacher:
    """Speaks the protocol of teachers.py.

    Args:
        memory: the file that keeps what the servers say that they serve, for later sessions.

    Attributes:
        identity: as data_prep/identity.py tells it. No address: other machines may serve the same.
        estimated: answers whose token counts the server did not tell. They are counted with the tokenizer, or taken as
            a quarter of the characters where there is none.
        notes: what befell the endpoints.

    Raises:
        RecipeError: the key's environment variable is not set, or extra_body names a field that is Retort's.
        EngineError: no endpoint answers, or one of them does not serve the model, or another one than earlier.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any | None, memory: Path | None = None) -> None:
        assert recipe.teacher is not None
        self.recipe, self.teacher, self.tokenizer = recipe, recipe.teacher, tokenizer
        options: HttpEngine = recipe.teacher.engine.options
        if ours := sorted(_OURS & set(options.extra_body)):
            raise RecipeError(f"{ours[0]} is set by Retort", f"{OPTIONS}.extra_body", "leave it out")
        self.options, self.estimated = options, 0
        self.served = options.served_as or served_name(recipe.teacher.model)
        self.identity = model_identity(recipe)
        self.hosted = is_hosted(recipe.teacher.model, options.urls)
        watch = Watch(self.served, self.hosted, memory, self.identity)
        self.client = Client(
            urls=options.urls,
            key=_key(options),
            parallel=options.parallel,
            seconds=options.seconds,
            retries=options.retries,
            requests=None if options.requests_per_minute is None else Bucket(options.requests_per_minute),
            tokens=None if options.tokens_per_minute is None else Bucket(options.tokens_per_minute),
            watch=watch.reply,
            listed=watch.listing,
            prompts="messages" if options.api == "chat" else "token ids",
            optional={"return_token_ids"},
        )
        self.client.list_models()

    def __repr__(self) -> str:
        return f"HttpTeacher({self.served} at {', '.join(map(shown, self.options.urls))})"

    @property
    def notes(self) -> list[str]:
        return self.client.notes

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answers as they finish. The requests are read a bounded number ahead, in the caller's thread."""
        for call, reply in stream(self.client, map(self._call, requests)):
            yield self._completion(call.about, reply)

    def score(self, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[Sparse]:
        """Distributions by `prompt_logprobs` of `/completions`, which vLLM alone offers: the likeliest tokens at
        temperature 1.

        Raises:
            EngineError: the recipe asks for more than that, or the server is no vLLM.
        """
        kept = self.teacher.logits
        if self.options.api != "completions" or kept is None or kept.kind != "topk" or kept.temperature != 1:
            raise EngineError(
                "a server scores only with api: completions and logits of kind topk at temperature 1",
                "teacher.logits",
                "change these, or use the engine transformers, which can do the rest",
            )
        calls = (self._score_call(ids, marked, kept.k, number) for number, (ids, marked) in enumerate(sequences))
        return self._scores(calls)

    def close(self) -> None:
        """End what is under way: an iterator that another thread waits for raises EngineError. Nothing else is held;
        connections and threads end with the iterators."""
        self.client.close()

    def _scores(self, calls: Iterator[Call]) -> Iterator[Sparse]:
        from distill.logits import sparse_from_topk

        for _, scores in stream(self.client, calls, ordered=True):
            if scores is None:
                scores = (np.zeros((0, 1)), np.zeros((0, 1)), np.zeros(0))
            yield sparse_from_topk(*scores)

    def _call(self, request: Request) -> Call:
        if self.options.api == "chat":
            body: dict[str, Any] = {"messages": list(request.messages)}
            if request.tools:
                body["tools"] = list(request.tools)
            if self.teacher.template_kwargs:
                body["chat_template_kwargs"] = self.teacher.template_kwargs
        elif request.prompt_ids is None:
            raise EngineError(
                "api: completions sends the prompt as token ids, and the teacher's tokenizer is not at hand",
                OPTIONS,
                "name it in teacher.tokenizer, or set api: chat",
            )
        else:
            body = {"prompt": list(request.prompt_ids)}
        body |= {"max_tokens": request.max_tokens, "seed": request.seed % _SEEDS, **request.sampling}
        if "top_k" in body:
            body["top_k"] = int(body["top_k"])
        if not self.hosted:
            body["return_token_ids"] = True  # vLLM's; a service would only refuse it
        path = "/chat/completions" if self.options.api == "chat" else "/completions"
        tokens = _prompt_tokens(request) + request.max_tokens

        def used(reply: Reply) -> int:
            return (reply.prompt_tokens or _prompt_tokens(request)) + (reply.completion_tokens or request.max_tokens)

        return Call(request.key, path, self._finished(body), tokens, read_answer, used, request)

    def _score_call(self, ids: Sequence[int], marked: Sequence[bool], k: int, number: int) -> Call:
        at = scored_positions(marked)
        body: dict[str, Any] = {"prompt": list(ids), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
        read = partial(read_scores, ids=tuple(ids), at=at, k=k)
        return Call(f"to score sequence {number}", "/completions", self._finished(body) if at else None, len(ids), read)

    def _finished(self, body: dict[str, Any]) -> dict[str, Any]:
        """With the model's name and the recipe's extra fields; a null leaves a field out."""
        full = {"model": self.served, **body, **self.options.extra_body}
        return {name: value for name, value in full.items() if value is not None}

    def _completion(self, request: Request, reply: Reply) -> Completion:
        text = self._text(request, reply)
        prompt, completion = reply.prompt_tokens, reply.completion_tokens
        if completion is None and reply.token_ids is not None:
            completion = len(reply.token_ids)
        if prompt is None or completion is None:
            self.estimated += 1
        return Completion(
            key=request.key,
            text=text,
            finish=reply.finish,
            token_ids=reply.token_ids,
            prompt_tokens=_prompt_tokens(request) if prompt is None else prompt,
            completion_tokens=self._estimate(request, reply, text) if completion is None else completion,
            seconds=reply.seconds,
            model=reply.model or self.served,
            max_tokens=request.max_tokens,
            tool_calls=reply.tool_calls,
        )

    def _text(self, request: Request, reply: Reply) -> str:
        """The answer's text, the same as under another engine as far as the server lets us see.

        A chat template may end the prompt with the tag that opens the thinking; then it is put back. In a chat that is
        done only where the thinking is seen to go on in the answer, since the server may have taken it away.
        """
        if self.tokenizer is None or request.prompt_ids is None:
            return reply.text
        raw = self.options.api == "completions"
        if raw and reply.token_ids and not {"stop", "stop_token_ids"} & set(self.options.extra_body):
            return completion_text(reply.token_ids, self.tokenizer, request.prompt_ids)
        opened = completion_text((), self.tokenizer, request.prompt_ids)
        text = reply.text
        if not opened or opened in text:
            return text
        goes_on = raw or reply.finish == CUT or dict(TAGS)[opened] in text
        return opened + text if goes_on else text

    def _estimate(self, request: Request, reply: Reply, text: str) -> int:
        """Tokens of an answer that the server did not count. They do not gainsay its word that the answer is whole."""
        if self.tokenizer is None:
            count = len(text) // 4
        else:
            count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return min(count, request.max_tokens - 1) if reply.finish in ENDED else count


def is_hosted(model: str, urls: Sequence[str]) -> bool:
    """Whether a service serves it, going by the model's name or an address."""
    prefix, _, name = model.partition(":")
    return bool(name and host_named(prefix)) or any(host_at(urlsplit(url).hostname or "") for url in urls)


def _key(options: HttpEngine) -> Key:
    if options.api_key_env is None:
        return Key()
    value = os.environ.get(options.api_key_env, "").strip()
    if not value:
        raise RecipeError(
            f"the environment variable {options.api_key_env} is not set", f"{OPTIONS}.api_key_env", "it holds the key"
        )
    return Key(options.api_key_env, SecretStr(value))


def _prompt_tokens(request: Request) -> int:
    """Tokens of a prompt; where it is not rendered, a quarter of its characters."""
    if request.prompt_ids is not None:
        return len(request.prompt_ids)
    return len(json.dumps([request.messages, request.tools], ensure_ascii=False)) // 4
