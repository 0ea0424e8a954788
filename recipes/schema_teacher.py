"""The teacher section of a recipe: who answers, how it is asked, what is kept of its answers, and what it scores."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from recipes.no_keys import Address, Further, Variable
from recipes.schema_rewards import RewardTerm, regular_expression
from recipes.sections import Bool, Count, Float, Fraction, Int, ModelRefText, Named, PathText, Section, Text

NotNegative = Annotated[Float, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, le=1)]


class Sampling(Section):
    """How answers are drawn. What is left out comes from the preset of the model's family."""

    preset: Text = Field("auto", description="auto: by the model's name; none; or a name of recipes/presets.yaml")
    temperature: NotNegative | None = Field(None, description="0: greedy")
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = Field(None, description="nucleus sampling; 1: off")
    top_k: Annotated[Int, Field(ge=0)] | None = Field(None, description="among the k likeliest tokens; 0: off")
    min_p: Annotated[Float, Field(ge=0, lt=1)] | None = Field(None, description="least share of the likeliest token")
    repetition_penalty: Positive | None = Field(None, description="1: off")
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = Field(None, description="0: off")
    max_tokens: Count = Field(1024, description="longest answer, thinking included; raising it redoes cut answers only")


class TransformersEngine(Section):
    """The teacher in this process, through transformers."""

    batching: Literal["auto", "continuous", "plain"] = Field("auto", description="auto: continuous on a GPU")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="as model.dtype")
    quantization: Literal["none", "nf4"] = Field("none", description="nf4: 4-bit weights through bitsandbytes")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: an NVIDIA card where one answers")
    batch_size: Count | None = Field(None, description="answers written side by side; default by memory")


class VllmEngine(Section):
    """The teacher in this process, through vLLM (extra: vllm)."""

    tensor_parallel: Count = Field(1, description="cards that share one copy of the model")
    memory: Annotated[Float, Field(gt=0, lt=1)] = Field(0.9, description="share of each card")
    max_model_len: Count | None = Field(None, description="longest prompt and answer together; default the model's")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the weights")
    extra: Further = Field(default_factory=dict, description="further arguments of vllm.LLM")


class HttpEngine(Section):
    """The teacher behind OpenAI-compatible servers (vLLM, SGLang, TGI, llama.cpp, Ollama, hosted ones)."""

    urls: Annotated[tuple[Address, ...], Field(min_length=1)] = Field(
        description="bases of the endpoints, such as [http://127.0.0.1:8000/v1]; they share the work"
    )
    served_as: Text | None = Field(None, description="the model's name at the server; default as teacher.model says")
    api: Literal["chat", "completions"] = Field(
        "chat", description="completions: the prompt as token ids, rendered here; the server must take them (vLLM does)"
    )
    api_key_env: Variable | None = Field(None, description="environment variable with the key; it is written nowhere")
    parallel: Count = Field(32, description="requests at a time, at each endpoint")
    requests_per_minute: Count | None = Field(None, description="over all endpoints")
    tokens_per_minute: Count | None = Field(None, description="prompt and answer, over all endpoints")
    seconds: Positive = Field(600.0, description="for one answer")
    retries: Annotated[Int, Field(ge=0)] = Field(8, description="tries after the first, with growing pauses")
    extra_body: Further = Field(default_factory=dict, description="further fields of every request; no keys")


class ReplayEngine(Section):
    """No teacher at all: the answers of an earlier run's journal."""

    run: PathText = Field(description="the run directory, such as runs/legal-distill")


class Engine(Named):
    """Who runs the teacher: a name, or a name with options."""

    transformers: TransformersEngine | None = None
    vllm: VllmEngine | None = None
    http: HttpEngine | None = None
    replay: ReplayEngine | None = None

    noun: ClassVar[str] = "engine"
    needs: ClassVar[dict[str, str]] = {"http": "urls: [http://127.0.0.1:8000/v1]", "replay": "run: runs/..."}


class Round(Section):
    """One question to the teacher about every row. Later rounds see what earlier ones wrote."""

    write: Text = Field(
        "answer",
        description="answer: the row's next assistant turn; user: its next user turn; else a column for later rounds",
    )
    ask: Text | None = Field(
        None, description="own wording with {column}, {prompt}, {conversation} places; default the row's own messages"
    )
    system: Text | None = Field(None, description="own system message of the question")
    split: Literal["whole", "lines", "json"] = Field(
        "whole", description="of a column: whole, or one row for each line, or for each entry of a JSON list"
    )
    student_sees: Text | None = Field(
        None, description="of an answer: wording of the student's prompt, with places; default the row's own messages"
    )
    samples: Count | None = Field(None, description="answers to each question; default teacher.samples (a column: 1)")
    max_tokens: Count | None = Field(None, description="default teacher.sampling.max_tokens")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.write != "answer" and self.student_sees is not None:
            raise ValueError("student_sees belongs to a round that writes the answer")
        if self.write in {"answer", "user"} and self.split != "whole":
            raise ValueError("split is for a round that writes a column")
        if self.write != "answer" and self.ask is None:
            raise ValueError(f"a round that writes {self.write} needs ask: what the teacher is to do")
        if not re.fullmatch(r"[A-Za-z]\w*", self.write):
            raise ValueError(f"'{self.write}' is no name of a column")
        return self


class Truncated(Section):
    """The answer was cut at max_tokens, by the engine's finish reason or by its count."""


class Empty(Section):
    """There is no answer (after the thinking, where there is thinking)."""


class Format(Section):
    """The answer lacks a form."""

    pattern: Text | None = Field(None, description="regular expression to be found in the whole completion")
    json_: Bool = Field(False, alias="json", description="the answer must be JSON")
    think: Bool = Field(False, description="one thinking block, then the answer")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        return None if value is None else regular_expression(value)

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.pattern is None and not self.json_ and not self.think:
            raise ValueError("format needs one of pattern, json: true, think: true")
        return self


class TemplateLeak(Section):
    """Markers of a chat template, or the beginning of another turn, stand in the answer."""


class Repetitive(Section):
    """Runs of words come again and again."""

    words: Count = Field(4, description="words of a run")
    most: Share = Field(0.3, description="share of 512 runs one after the other that are repeats")


class AnswerLength(Section):
    """The answer is shorter or longer, in tokens."""

    min_tokens: Annotated[Int, Field(ge=0)] = Field(1, description="shortest completion")
    max_tokens: Count | None = Field(None, description="longest completion")


class AnswerLanguage(Section):
    """The answer is in another language."""

    keep: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(description="ISO codes, such as [en]")


class Grounded(Section):
    """Too little of the answer stands in the passage."""

    column: Text = Field("passage", description="column with the passage")
    share: Share = Field(0.5, description="of the answer's word 3-grams (short answers: words) found in the passage")


class Verified(Section):
    """The sum of teacher.verify is lower."""

    at_least: Float = Field(1.0, description="lowest sum that is kept")


class Vote(Section):
    """The answer differs from that of most samples of its prompt."""

    share: Share = Field(0.5, description="of the samples, cut ones too, that the most frequent answer needs")


class NearDuplicate(Section):
    """Prompt and answer, and the answer alone, are nearly those of an earlier kept row."""

    threshold: Annotated[Float, Field(ge=0.3, le=1)] = Field(0.9, description="Jaccard similarity of word 3-grams")


class Contaminated(Section):
    """Prompt or answer overlaps with a held-out row."""

    words: Annotated[Int, Field(ge=5, le=50)] = Field(13, description="words in a row that make an overlap")
    similarity: Fraction | None = Field(0.6, description="similarity of texts that count as the same; null: off")


class Filter(Named):
    """What is dropped: a name, or a name with options."""

    truncated: Truncated | None = None
    empty: Empty | None = None
    format: Format | None = None
    template_leak: TemplateLeak | None = None
    repetition: Repetitive | None = None
    length: AnswerLength | None = None
    language: AnswerLanguage | None = None
    grounded: Grounded | None = None
    verified: Verified | None = None
    vote: Vote | None = None
    near_duplicate: NearDuplicate | None = None
    contaminated: Contaminated | None = None

    noun: ClassVar[str] = "filter"
    needs: ClassVar[dict[str, str]] = {"format": "think: true", "language": "keep: [en]"}


class Logits(Section):
    """What is kept of the teacher's distributions."""

    kind: Literal["topk", "sampled"] = Field(
        "topk", description="topk: the likeliest tokens and the mass of the rest; sampled: draws, which are unbiased"
    )
    k: Count = Field(32, description="topk: tokens of a position (about 6 bytes each)")
    draws: Count = Field(50, description="sampled: draws of a position; equal ones are stored once (8 bytes)")
    temperature: Positive = Field(1.0, description="of both softmaxes; it must be known when the cache is made")
    spread: Positive = Field(1.0, description="sampled: draws come from the distribution at this temperature")
    while_generating: Bool = Field(True, description="keep them as answers are written, where the engine can")


class Price(Section):
    """What the teacher costs, for the report."""

    currency: Text = Field("USD", description="a code")
    prompt: NotNegative = Field(0.0, description="a million prompt tokens")
    completion: NotNegative = Field(0.0, description="a million answer tokens")
    hour: NotNegative = Field(0.0, description="an hour of the machine that runs it")


class Teacher(Section):
    """The model whose outputs train the student."""

    model: Text = Field(description="org/name@revision, a local folder, embedded:NAME, or a service: openai:gpt-4o")
    license: Text | None = Field(None, description="its licence, where no file states it")
    tokenizer: ModelRefText | None = Field(None, description="where its tokenizer is, when not with the model")
    template_kwargs: dict[Text, Bool | Int | Text] = Field(
        default_factory=dict, description="variables for its chat template, such as enable_thinking: false"
    )
    engine: Engine = Field(default_factory=lambda: Engine(transformers=TransformersEngine()), description="who runs it")
    sampling: Sampling = Field(default_factory=Sampling, description="how answers are drawn")
    samples: Count = Field(1, description="answers to every prompt")
    rounds: Annotated[tuple[Round, ...], Field(min_length=1)] = Field(
        (Round(),), description="what it is asked, one after the other; default: to answer"
    )
    keep_thinking: Bool = Field(True, description="the student learns the thinking too, where there is some")
    verify: tuple[RewardTerm, ...] = Field((), description="reward functions that mark every answer")
    filters: tuple[Filter, ...] = Field(
        (Filter(truncated=Truncated()), Filter(empty=Empty()), Filter(template_leak=TemplateLeak())),
        description="what is dropped; whatever else can be told of an answer is only counted",
    )
    keep: Literal["all", "best", "first"] = Field(
        "all", description="of a prompt's answers that pass: all, the best by verify (then by vote), or the first"
    )
    logits: Logits | None = Field(None, description="keep its distributions; method distill, mode logits needs them")
    price: Price | None = Field(None, description="for the report's cost of a kept row")

    @model_validator(mode="after")
    def _rounds_end(self) -> Self:
        if self.rounds[-1].write != "answer":
            raise ValueError("the last round must write the answer")
        names = [f.name for f in self.filters]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the filter {twice[0]} is listed twice")
        if "verified" in names and not self.verify:
            raise ValueError("the filter verified needs teacher.verify: the functions that mark an answer")
        if self.keep == "best" and not self.verify and self.samples < 3:
            raise ValueError("keep: best needs teacher.verify, or three samples that can vote")
        return self

    @property
    def dropping(self) -> dict[str, Any]:
        """Options of the filters that drop, by name."""
        return {f.name: f.options for f in self.filters}
