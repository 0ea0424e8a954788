"""The recipe: what a run is asked to do, as frozen pydantic models. Unknown keys are errors.

This module, with the sections in the schema_*.py files, is the only list of recipe fields; the reference page and the
JSON Schema are generated from it. It imports neither torch nor transformers, so that a recipe is checked in
milliseconds.
"""

from __future__ import annotations

import difflib
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, StringConstraints, field_validator, model_validator

from recipes.no_keys import Further
from recipes.refs import Ref, parse_ref, path_of
from recipes.schema_data import Data
from recipes.schema_method import METHODS, MODES, SFT, Method
from recipes.schema_teacher import Teacher
from recipes.sections import Bool, Count, Float, Fraction, Int, ModelRefText, PathText, Section, Text


class Use(Section):
    """What the finished model is for; the licence gate judges the lineage against it."""

    purpose: Literal["commercial", "research", "internal"] = Field(description="what the model will be used for")
    distribute: Bool = Field(description="whether weights or outputs leave the organisation")
    name: Text | None = Field(None, description="name under which the model is published")
    monthly_active_users: Annotated[Int, Field(ge=0)] | None = Field(None, description="of all products that use it")
    annual_revenue_usd: Annotated[Float, Field(ge=0)] | None = Field(
        None, description="of the organisation, in US dollars"
    )
    territories: tuple[Text, ...] | None = Field(None, description="ISO country codes where it is used")
    competes_with: tuple[Text, ...] | None = Field(None, description="products the model competes with")

    @field_validator("territories")
    @classmethod
    def _codes(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        codes = tuple("GB" if c.upper() == "UK" else c.upper() for c in value or ())
        if wrong := [c for c in codes if not (len(c) == 2 and c.isalpha() and c.isascii()) and c != "EEA"]:
            raise ValueError(f"'{wrong[0]}' is no country: write ISO codes such as DE or US, or EU, EEA")
        return codes or None


class Attest(Section):
    """A person's decision on one asset: settles what is unknown or left to review, or records a private agreement."""

    asset: Text = Field(description="the asset as the recipe or `retort gate` names it")
    who: Text = Field(description="the person who decided")
    when: date = Field(description="date of the decision")
    why: Text = Field(description="what the decision rests on")
    sha256: Annotated[Text, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="of the agreement; without it a clause that forbids the plan still blocks"
    )
    expires: date | None = Field(None, description="last day on which it holds; default a year after `when`")

    @property
    def ends(self) -> date:
        return self.expires or self.when + timedelta(days=365)

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.ends < self.when:
            raise ValueError("expires lies before when")
        return self


class Model(Section):
    """The base model and how it is loaded."""

    base: ModelRefText = Field(
        description="org/name@revision, a local folder, or embedded:NAME; with run the base of that run"
    )
    run: PathText | None = Field(
        None, description="start from what an earlier run made: its directory, such as runs/legal"
    )
    merge: Bool = Field(
        False, description="run: merge its adapter into the base and train a new one, instead of training it on"
    )
    tokenizer: ModelRefText | None = Field(None, description="where the tokenizer is, when not with the base")
    license: Text | None = Field(None, description="SPDX id of the base's licence, where no file states it")
    public_key: PathText | None = Field(
        None, description="PEM file; the base's files must be signed by its owner (model-signing)"
    )
    quantization: Literal["none", "nf4"] = Field(
        "none", description="nf4: 4-bit base weights through bitsandbytes (QLoRA)"
    )
    double_quant: Bool = Field(True, description="nf4 only: quantise the quantisation constants too (QLoRA, section 3)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the device computes in it, float32 on a CPU"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="attention implementation; auto leaves the choice to transformers"
    )
    chat_template: PathText | None = Field(
        None, description="a .jinja file that replaces the tokenizer's chat template"
    )
    template_kwargs: dict[Text, Bool | Int | Text] = Field(
        default_factory=dict, description="variables for the chat template, such as enable_thinking: false"
    )
    trust_remote_code: ModelRefText | None = Field(
        None, description="off unless it names the very repository and revision whose code may run"
    )

    @property
    def ref(self) -> Ref:
        return parse_ref(self.base)

    @model_validator(mode="after")
    def _merged_run(self) -> Self:
        if self.merge and self.run is None:
            raise ValueError("merge says how a run is continued: name it (run: runs/legal)")
        return self

    @model_validator(mode="after")
    def _consent(self) -> Self:
        if self.trust_remote_code is None:
            return self
        ref = parse_ref(self.trust_remote_code)
        if ref.kind == "hub" and ref.revision is None:
            raise ValueError("trust_remote_code must carry a revision (org/name@commit), for the code may change")
        if self.trust_remote_code != self.base:
            raise ValueError(f"trust_remote_code must repeat model.base ('{self.base}') word for word")
        return self


class Adapter(Section):
    """A LoRA adapter (peft). `adapter: null` trains all weights instead."""

    type: Literal["lora"] = Field("lora", description="the only kind of adapter so far")
    r: Count = Field(16, description="rank")
    alpha: Annotated[Float, Field(gt=0)] | None = Field(None, description="LoRA alpha; default 2 * r (update scale 2)")
    dropout: Annotated[Float, Field(ge=0, lt=1)] = Field(0.0, description="LoRA dropout")
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        "all-linear", description="all-linear (all but the output head), or a list of module names"
    )
    target_parameters: tuple[Text, ...] = Field(
        (), description="weights that are no linear layers, such as fused experts (mlp.experts.gate_up_proj)"
    )
    modules_to_save: tuple[Text, ...] = Field((), description="modules trained whole and saved beside the adapter")
    dora: Bool = Field(False, description="weight-decomposed LoRA (DoRA)")
    rslora: Bool = Field(False, description="scale by alpha / sqrt(r) instead of alpha / r (rsLoRA)")
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = Field(
        "default", description="initialisation of A and B; pissa and olora start from the base weights"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            raise ValueError(f"one target is a list too: [{value}]; or write all-linear")
        return value


class Best(Section):
    """Keep the weights of the best evaluation, and stop when there is no better one for long."""

    metric: Metric = Field("loss", description="what decides; measured at every train.eval_every")
    patience: Count | None = Field(None, description="stop after this many evaluations without a better one")
    min_change: Annotated[Float, Field(ge=0)] = Field(0.0, description="what counts as better")


class Guards(Section):
    """What stops a run, with a checkpoint and a diagnosis. null switches a guard off; NaN always stops."""

    kl: Annotated[Float, Field(gt=0)] | None = Field(
        10.0, description="mean KL to the start per token, in nats (GRPO with beta above 0, KTO)"
    )
    length: Annotated[Float, Field(gt=1)] | None = Field(
        4.0, description="completions this many times as long as at the start and half of them cut (GRPO)"
    )
    entropy: Annotated[Float, Field(gt=0, lt=1)] | None = Field(
        0.02, description="entropy of the completions down to this share of the start's (GRPO)"
    )
    chosen_falls: Annotated[Float, Field(gt=0)] | None = Field(
        2.0,
        description="log-probability of chosen answers this far below the start's, in nats per token (DPO, KTO, ORPO)",
    )
    window: Count = Field(10, description="log lines in a row for which it must hold")


class Train(Section):
    """How long, how fast, and in which layout."""

    epochs: Annotated[Float, Field(gt=0)] | None = Field(None, description="passes over the training rows (default 1)")
    max_steps: Count | None = Field(None, description="optimiser steps, instead of epochs")
    tokens_per_step: Count = Field(16384, description="tokens in one optimiser step, over all devices")
    seq_len: Annotated[Int, Field(ge=8)] = Field(
        2048, description="longest row, in tokens; not set, at most the context of a base that is a folder here"
    )
    learning_rate: Annotated[Float, Field(gt=0, lt=1)] = Field(2e-4, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning-rate decay after the warm-up"
    )
    warmup: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.03, description="share of the steps with rising learning rate"
    )
    weight_decay: Annotated[Float, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay")
    max_grad_norm: Annotated[Float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this norm")
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "auto", description="auto: paged 8-bit AdamW on a GPU with nf4, plain AdamW elsewhere"
    )
    packing: Bool = Field(False, description="fill sequences with several rows that never attend to each other")
    micro_batch: Count | None = Field(
        None,
        description="rows (packed: sequences) per device and forward, fewer for a small step; default derived",
    )
    gradient_checkpointing: Literal["auto"] | Bool = Field("auto", description="recompute activations to save memory")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: an NVIDIA card where one answers")
    eval_every: Fraction | Count | None = Field(
        None, description="steps, or share of the run, between measurements on held-out rows"
    )
    best: Best | None = Field(None, description="keep the best weights instead of the last, and stop early")
    guards: Guards = Field(default_factory=Guards, description="what stops a run that goes wrong")
    save_every: Fraction | Count = Field(0.25, description="steps, or share of the run, between checkpoints")
    keep_checkpoints: Count = Field(2, description="older checkpoints are deleted")
    copy_checkpoints: PathText | None = Field(None, description="a folder, on another disk, that gets a copy of each")
    log_every: Count = Field(1, description="steps between log lines")
    extra: Further = Field(
        default_factory=dict, description="further fields of TRL's config class of the method, checked against it"
    )

    @field_validator("eval_every", "save_every", mode="before")
    @classmethod
    def _whole_or_share(cls, value: Any) -> Any:
        if isinstance(value, float) and value >= 1:
            raise ValueError(f"{value:g} is neither a whole number of steps nor a share of the run below 1")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                "epochs and max_steps say the same thing; give one of them, and null for one that is inherited"
            )
        if self.best is not None and self.eval_every is None:
            raise ValueError("best is decided by evaluations: set eval_every, such as 0.1")
        return self


Metric = Literal[
    "loss",
    "perplexity",
    "exact_match",
    "label_accuracy",
    "macro_f1",
    "token_f1",
    "preference_accuracy",
    "reward_accuracy",
    "reward",
]
DEFAULT_METRICS: dict[str, tuple[Metric, ...]] = {
    "sft": ("loss", "perplexity", "exact_match", "token_f1"),
    "dpo": ("preference_accuracy", "reward_accuracy", "loss"),
    "kto": ("preference_accuracy", "reward_accuracy", "loss"),
    "orpo": ("preference_accuracy", "loss", "perplexity"),
    "reward": ("preference_accuracy",),
    "grpo": ("reward", "exact_match"),
    "sequence": ("loss", "perplexity", "exact_match", "token_f1"),
    "logits": ("loss", "perplexity", "exact_match", "token_f1"),
    "on_policy": ("exact_match", "token_f1"),
    "preference": ("preference_accuracy", "reward_accuracy", "loss"),
}
POSSIBLE_METRICS: dict[str, set[str]] = {
    "sft": set(get_args(Metric)) - {"preference_accuracy", "reward_accuracy", "reward"},
    "dpo": set(get_args(Metric)) - {"reward"},
    "kto": set(get_args(Metric)) - {"reward"},
    "orpo": set(get_args(Metric)) - {"reward"},
    "reward": {"preference_accuracy"},
    "grpo": {"reward", "exact_match", "label_accuracy", "macro_f1", "token_f1"},
    "on_policy": {"exact_match", "label_accuracy", "macro_f1", "token_f1"},
}
POSSIBLE_METRICS |= {"sequence": POSSIBLE_METRICS["sft"], "logits": POSSIBLE_METRICS["sft"]}
POSSIBLE_METRICS |= {"preference": POSSIBLE_METRICS["dpo"]}


class Eval(Section):
    """The measurement of base and tuned model on the held-out rows."""

    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = Field(
        DEFAULT_METRICS["sft"], description="what to measure; the default depends on the method (docs/methods.md)"
    )
    samples: Annotated[Int, Field(ge=1)] | None = Field(
        200, description="held-out rows to measure, drawn by the seed (whole groups); null: all"
    )
    max_new_tokens: Count = Field(64, description="longest greedy answer")
    labels: Annotated[tuple[Text, ...], Field(min_length=2)] | None = Field(
        None,
        description="answers that are class labels; rows with such an answer count for label_accuracy and macro_f1",
    )
    confidence: Annotated[Float, Field(ge=0.5, lt=1)] = Field(0.95, description="level of the bootstrap intervals")
    resamples: Annotated[Int, Field(ge=200, le=20_000)] = Field(2000, description="bootstrap and permutation draws")

    @model_validator(mode="after")
    def _labels_named(self) -> Self:
        if self.labels is None and {"label_accuracy", "macro_f1"} & set(self.metrics):
            raise ValueError("label_accuracy and macro_f1 need eval.labels: the list of answers that are labels")
        return self


class Wandb(Section):
    """Weights & Biases tracking."""

    project: Text = Field(description="wandb project")
    entity: Text | None = Field(None, description="wandb team or user")
    name: Text | None = Field(None, description="run name; default the recipe's name")
    tags: tuple[Text, ...] = Field((), description="wandb tags")
    mode: Literal["auto", "online", "offline"] = Field(
        "auto", description="auto: online where a key is configured, offline elsewhere; it never asks"
    )


class Track(Section):
    """Where the run is tracked beside its own files."""

    wandb: Wandb | None = None


class Recipe(Section):
    """A whole run."""

    schema_version: Literal[1] = Field(1, description="version of this format")
    name: Annotated[Text, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)] = Field(
        description="names the run directory: runs/<name>"
    )
    description: str = Field("", description="a sentence for people; shown in report and card")
    output: PathText | None = Field(None, description="run directory, when not runs/<name>")
    seed: Annotated[Int, Field(ge=0, lt=2**31)] = Field(42, description="of splits, order, initialisation, draws")
    use: Use | None = Field(
        None, description="what the model is for; without it only a plain ban is told, and nothing can be exported"
    )
    attest: tuple[Attest, ...] = Field((), description="decisions of people on licences; not from the command line")
    model: Model
    adapter: Adapter | None = Field(default_factory=Adapter, description="null: full fine-tuning")
    data: Data
    teacher: Teacher | None = Field(None, description="a larger model that writes, or scores, what the student learns")
    method: Method = Field(default_factory=SFT)
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)
    track: Track = Field(default_factory=Track)

    @model_validator(mode="before")
    @classmethod
    def _metrics_of_the_method(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        method, ask = value.get("method", "sft"), value.get("eval") or {}
        kind = method.get("type", "sft") if isinstance(method, dict) else method
        if kind == "distill":
            kind = method.get("mode", "sequence") if isinstance(method, dict) else "sequence"
        if kind not in DEFAULT_METRICS or not isinstance(ask, dict) or ask.get("metrics") is not None:
            return value
        return {**value, "eval": {**ask, "metrics": DEFAULT_METRICS[kind]}}

    @field_validator("method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        made = {"type": value} if isinstance(value, str) else value
        if not isinstance(made, dict):
            return made
        made = {"type": "sft", **made}
        if made["type"] not in METHODS:
            close = difflib.get_close_matches(str(made["type"]), METHODS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"methods are {', '.join(METHODS)}"
            raise ValueError(f"there is no method '{made['type']}'; {hint}")
        if made["type"] == "distill":
            made = {"mode": "sequence", **made}
            if made["mode"] not in MODES:
                close = difflib.get_close_matches(str(made["mode"]), MODES, n=1)
                hint = f"did you mean {close[0]}?" if close else f"modes are {', '.join(MODES)}"
                raise ValueError(f"there is no mode '{made['mode']}' of distillation; {hint}")
        return made

    @model_validator(mode="after")
    def _together(self) -> Self:
        kind = self.method.key
        wanted = [*self.eval.metrics, *([self.train.best.metric] if self.train.best else [])]
        if wrong := [m for m in wanted if m not in POSSIBLE_METRICS[kind]]:
            known = ", ".join(m for m in get_args(Metric) if m in POSSIBLE_METRICS[kind])
            raise ValueError(f"the metric {wrong[0]} does not exist for method {kind}; there are {known}")
        if kind not in {"sft", "sequence"} and self.train.packing:
            raise ValueError(f"packing is for method sft; {kind} compares whole answers: set train.packing to false")
        if self.longest_row < 8:
            raise ValueError("method.max_new_tokens leaves no room for a prompt: raise train.seq_len")
        if self.train.best is not None and self.data.eval is None:
            raise ValueError("train.best needs held-out rows: give data.eval")
        if self.data.requests and self.teacher is None:
            raise ValueError("data.requests are made for a teacher: name one (teacher: {model: ...})")
        self._taught()
        if self.adapter is None and self.model.quantization != "none":
            raise ValueError(
                "a quantised base cannot be trained whole: set model.quantization to none, or give an adapter"
            )
        by_vllm = getattr(self.method, "engine", None) == "vllm" or getattr(self.method, "vllm", None) is not None
        if by_vllm and self.model.quantization == "nf4":
            # It is handed the adapter merged into the base, which rounds the base anew before every generation: logits
            # had moved by 0.28 after one, and the policy that learns is no longer the one that the adapter fits.
            raise ValueError("vLLM cannot take over an adapter on nf4: set model.quantization: none, or leave vLLM out")
        if self.adapter is not None and self.adapter.init in {"pissa", "olora"} and self.model.quantization != "none":
            raise ValueError(
                f"adapter.init {self.adapter.init} needs unquantised weights: set model.quantization to none"
            )
        return self

    def _taught(self) -> None:
        """Distillation needs a teacher, and what a mode needs of it must be asked for."""
        method, teacher = self.method, self.teacher
        if method.type != "distill":
            return
        if teacher is None:
            raise ValueError("method distill needs a teacher (teacher: {model: org/name@revision})")
        if method.mode == "logits" and teacher.logits is None:
            raise ValueError("mode logits needs teacher.logits: what is kept of its distributions (teacher.logits: {})")
        if method.mode == "logits" and method.answers == "given" and self.data.requests:
            raise ValueError("answers: given walks along the rows' answers, and requests have none")
        if method.mode == "preference" and method.pairs == "judged" and not teacher.verify:
            raise ValueError("pairs: judged needs teacher.verify: the functions that judge")
        if method.mode == "on_policy" and teacher.engine.name != "transformers":
            raise ValueError("mode on_policy runs the teacher beside the student: teacher.engine must be transformers")

    @property
    def prompts_only(self) -> bool:
        """Whether rows are prompts whose answers are yet to be written."""
        return "prompt" in self.method.kinds

    @property
    def longest_row(self) -> int:
        """Tokens that a row may have: where the model completes it while training, the completion needs its room."""
        return self.train.seq_len - getattr(self.method, "max_new_tokens", 0)

    @property
    def run_dir(self) -> Path:
        return path_of(self.output) if self.output else Path("runs") / self.name

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain YAML/JSON values."""
        return self.model_dump(mode="json", by_alias=True)
