"""Reward functions as a recipe names them, with their options. What they compute is in finetune/rewards.py."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from recipes.no_keys import Address, Variable
from recipes.sections import Bool, Count, Float, Named, Section, Text


def regular_expression(text: str) -> str:
    """The text, when it compiles."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return text


class _Reward(Section):
    weight: Annotated[Float, Field(ge=0)] = Field(1.0, description="in the sum of the rewards; 0: only watched")


class _Compared(_Reward):
    column: Text | None = Field(
        None, description="column with the wanted answer; default the last assistant turn of the row"
    )


class Exact(_Compared):
    """1 where the answer (what follows the thinking) equals the wanted one."""

    normalise: Bool = Field(True, description="ignore case, punctuation, articles and white space")


class Math(_Compared):
    """1 where the answer is mathematically equal to the wanted one (math-verify); GSM8K's #### is understood."""


class Label(_Compared):
    """1 where the answer is the wanted label and names no other one."""

    labels: Annotated[tuple[Text, ...], Field(min_length=2)] = Field(description="all labels")


class Regex(_Reward):
    """1 where a pattern is found in the completion."""

    pattern: Text = Field(description="a regular expression; . matches line breaks too")
    whole: Bool = Field(False, description="the completion must match from end to end")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        return regular_expression(value)


class Think(_Reward):
    """1 where the completion is one thinking block and then an answer."""

    open: Text = Field("<think>", description="tag that opens the thinking, by the model or at the prompt's end")
    close: Text = Field("</think>", description="tag that closes it")


class JsonSchema(_Reward):
    """1 where the answer is JSON (fenced or bare) that satisfies a schema."""

    schema_: dict[str, Any] | Text = Field(alias="schema", description="a JSON Schema, or the path of one")


class Citation(_Reward):
    """Share of the answer's quotations that stand in the passage; 0 without any quotation."""

    column: Text = Field("passage", description="column with the passage")
    min_words: Count = Field(3, description="shorter quotations do not count")


class Length(_Reward):
    """0 up to `most - slack` tokens, then falling to -1 at `most` (soft overlong punishment of DAPO)."""

    most: Count = Field(description="tokens of a completion")
    slack: Count = Field(description="tokens before `most` over which the reward falls")

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.slack > self.most:
            raise ValueError(f"slack {self.slack} is more than most {self.most}")
        return self


class Repetition(_Reward):
    """From 0 (no word n-gram occurs twice) down to -1 (all are repeats)."""

    words: Count = Field(3, description="words of an n-gram")


class Code(_Reward):
    """Share of tests that the answer's code passes, run in a subprocess with limits; nothing leaves it."""

    column: Text = Field("tests", description="column with the tests: a list of assert statements, or one text")
    entry: Text | None = Field(
        None,
        description="column with the names, one or a list, that tests take from the answer; without it those that the "
        "row's own answer defines, and without one of these the only name that its tests leave open",
    )
    seconds: Annotated[Float, Field(gt=0, le=60)] = Field(5.0, description="for all tests of a completion")
    memory_mb: Annotated[int, Field(ge=64, le=8192)] = Field(256, description="address space of the subprocess")


class Judge(_Reward):
    """A mark from a language model behind an OpenAI-compatible endpoint, scaled to 0..1."""

    model: Text = Field(description="the judge, as the licence gate knows it: org/name, or a service: openai:gpt-4o")
    url: Address = Field(description="base of the endpoint, such as http://127.0.0.1:8000/v1")
    api_key_env: Variable | None = Field(None, description="environment variable with the key")
    prompt: Text | None = Field(
        None, description="own wording with {prompt}, {completion} and {reference} places; it must ask for a number"
    )
    most: Annotated[Float, Field(gt=0)] = Field(10.0, description="the highest mark")
    seconds: Annotated[Float, Field(gt=0)] = Field(60.0, description="for one answer of the judge")
    parallel: Count = Field(8, description="requests at a time")


class Function(_Reward):
    """The user's own function: `score(sample) -> float | None`. It runs with all rights of the training process."""

    path: Text = Field(description="package.module:function")
    trust: Text | None = Field(None, description="repeats `path` word for word: this code may run")

    @model_validator(mode="after")
    def _consent(self) -> Self:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", self.path):
            raise ValueError(f"'{self.path}' is no import path; write package.module:function")
        if self.trust != self.path:
            raise ValueError(f"own code runs only with consent: add trust: {self.path}")
        return self


class RewardTerm(Named):
    """One reward: its name, or its name with options."""

    exact: Exact | None = None
    math: Math | None = None
    label: Label | None = None
    regex: Regex | None = None
    think: Think | None = None
    json_schema: JsonSchema | None = None
    citation: Citation | None = None
    length: Length | None = None
    repetition: Repetition | None = None
    code: Code | None = None
    judge: Judge | None = None
    function: Function | None = None

    noun: ClassVar[str] = "reward"
    needs: ClassVar[dict[str, str]] = {
        "label": "labels: [yes, no]",
        "regex": "pattern: ...",
        "json_schema": "schema: ...",
        "length": "most: 256, slack: 64",
        "judge": "model: ..., url: ...",
        "function": "path: package.module:function, trust: package.module:function",
    }
