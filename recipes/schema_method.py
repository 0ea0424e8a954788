"""The method section of a recipe: how the model learns from the rows, with the options of each method.

Names and defaults follow TRL's configs, whose trainers do the work; where a default differs, the description says why.
`kinds` are the kinds of rows that a method reads.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from recipes.no_keys import Address
from recipes.schema_rewards import RewardTerm
from recipes.sections import Bool, Count, Float, Int, Section

RowKind = Literal["chat", "text", "preference", "labelled", "prompt"]
Positive = Annotated[Float, Field(gt=0)]
NotNegative = Annotated[Float, Field(ge=0)]

DPOLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip
# Losses that can be told which share of the labels is wrong.
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired")
GRPOLoss = Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "luspo", "sapo", "vespo"]


class _Method(Section):
    """What every method has."""

    @property
    def key(self) -> str:
        """Its name in tables of methods: the type, of a distillation its mode."""
        return str(getattr(self, "mode", None) or self.type)  # type: ignore[attr-defined]


class SFT(_Method):
    """Supervised fine-tuning on chats or plain texts."""

    type: Literal["sft"] = Field("sft", description="supervised fine-tuning")
    on: Literal["assistant", "text"] = Field(
        "assistant",
        description="assistant: loss on the assistant's tokens; text: on every token (continued pretraining)",
    )

    @property
    def kinds(self) -> tuple[RowKind, ...]:
        return ("chat",) if self.on == "assistant" else ("text",)


class DPO(_Method):
    """Direct preference optimisation on pairs of a chosen and a rejected answer (Rafailov et al. 2023)."""

    kinds: ClassVar[tuple[RowKind, ...]] = ("preference",)
    type: Literal["dpo"] = Field(description="direct preference optimisation")
    loss: Annotated[dict[DPOLoss, Positive], Field(min_length=1)] = Field(
        {"sigmoid": 1.0},
        description="losses and their weights; sigmoid_norm and ipo normalise by length, sft adds the chosen answer's",
    )
    beta: Positive = Field(0.1, description="strength of the pull towards the reference; 0.01 to 0.5 are usual")
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = Field(
        0.0,
        description="share of pairs whose labels are taken to be wrong; sigmoid becomes cDPO. Also for sigmoid_norm, "
        "robust, exo_pair, aot, aot_unpaired",
    )
    reference_free: Bool = Field(False, description="compare with a uniform reference instead of the model's start")
    length_desensitised: Annotated[Float, Field(ge=0, le=1)] | None = Field(
        None, description="LD-DPO: weight of the tokens beyond the shorter answer's length; null: all count alike"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_loss(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("loss"), str):
            return {**value, "loss": {value["loss"]: 1.0}}
        return value

    @model_validator(mode="after")
    def _smoothed(self) -> Self:
        if "exo_pair" in self.loss and not self.label_smoothing:
            raise ValueError("the loss exo_pair needs label_smoothing above 0; its authors use 1e-3")
        compared: list[str] = [name for name in self.loss if name != "sft"]
        if self.label_smoothing and (without := [name for name in compared or ["sft"] if name not in SMOOTHED]):
            raise ValueError(f"the loss {without[0]} has no label_smoothing; {', '.join(SMOOTHED)} have")
        if self.reference_free and self.length_desensitised is not None:
            raise ValueError("length_desensitised weighs the reference's tokens too: leave reference_free out")
        return self


class KTO(_Method):
    """Learning from single answers labelled good or bad (Ethayarajh et al. 2024). Pairs count as one of each."""

    kinds: ClassVar[tuple[RowKind, ...]] = ("labelled", "preference")
    type: Literal["kto"] = Field(description="Kahneman-Tversky optimisation")
    loss: Literal["kto", "apo_zero_unpaired"] = Field("kto", description="apo_zero_unpaired needs no KL term")
    beta: Positive = Field(0.1, description="strength of the pull towards the reference")
    desirable_weight: Positive = Field(1.0, description="weight of good answers")
    undesirable_weight: Positive = Field(
        1.0, description="weight of bad ones; (good rows x their weight) / (bad rows x theirs) is best from 1 to 4/3"
    )


class ORPO(_Method):
    """Odds-ratio preference optimisation: imitation and preference in one loss, no reference (Hong et al. 2024)."""

    kinds: ClassVar[tuple[RowKind, ...]] = ("preference",)
    type: Literal["orpo"] = Field(description="odds-ratio preference optimisation")
    beta: Positive = Field(0.1, description="weight of the odds ratio against the chosen answers' loss (lambda)")
    imitate: Literal["answer", "all"] = Field(
        "answer", description="tokens of the chosen side that are imitated; all: the prompt too, as TRL does"
    )


class RewardModel(_Method):
    """A model that scores answers, trained on pairs (Bradley-Terry)."""

    kinds: ClassVar[tuple[RowKind, ...]] = ("preference",)
    type: Literal["reward"] = Field(description="a reward model")
    center: NotNegative | None = Field(
        None, description="weight of the squared sum of both scores, which keeps them around 0 (0.01 is usual)"
    )


class VLLM(Section):
    """Completions by vLLM."""

    mode: Literal["colocate", "server"] = Field("colocate", description="in the training process, or a running server")
    url: Address | None = Field(
        None, description="server: where `trl vllm-serve` listens, such as http://127.0.0.1:8000"
    )
    memory: Annotated[Float, Field(gt=0, lt=1)] = Field(0.3, description="colocate: share of the card for vLLM")
    sleep: Bool = Field(True, description="colocate: give the memory back while the weights are trained")
    tensor_parallel: Count = Field(1, description="colocate: cards that share one copy of the model")

    @model_validator(mode="after")
    def _address(self) -> Self:
        if (self.mode == "server") != (self.url is not None):
            raise ValueError("mode server needs url, and mode colocate has none")
        return self


class GRPO(_Method):
    """Group-relative policy optimisation: the model's own completions, scored by rewards (Shao et al. 2024)."""

    kinds: ClassVar[tuple[RowKind, ...]] = ("prompt", "chat")
    type: Literal["grpo"] = Field(description="group-relative policy optimisation")
    rewards: Annotated[tuple[RewardTerm, ...], Field(min_length=1)] = Field(
        description="reward functions, each a name or a name with options; their weighted sum is the reward"
    )
    prompts_per_step: Count = Field(8, description="prompts in one optimiser step, over all devices")
    generations: Annotated[Int, Field(ge=2)] = Field(8, description="completions of a prompt, compared as one group")
    max_new_tokens: Count = Field(256, description="longest completion")
    iterations: Count = Field(1, description="updates on the same completions (mu)")
    loss: GRPOLoss = Field("dapo", description="how the token losses are put together")
    beta: NotNegative = Field(0.0, description="weight of the KL to the starting model; 0 leaves it out")
    epsilon: Annotated[Float, Field(gt=0, lt=1)] = Field(0.2, description="lower clipping of the probability ratio")
    epsilon_high: Positive | None = Field(None, description="upper clipping (DAPO: 0.28); null: as epsilon")
    delta: Positive | None = Field(None, description="second upper limit of the ratio (two-sided clipping)")
    importance_sampling: Literal["token", "sequence"] = Field(
        "token", description="level of the ratio; GSPO: sequence, loss: grpo"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="what advantages are divided by")
    mask_truncated: Bool = Field(False, description="completions cut at max_new_tokens do not count in the loss")
    temperature: Positive = Field(1.0, description="of the sampling")
    top_p: Annotated[Float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling; 1: off")
    top_k: Annotated[Int, Field(ge=0)] = Field(0, description="sampling among the k likeliest tokens; 0: off")
    min_p: Annotated[Float, Field(ge=0, lt=1)] | None = Field(None, description="least share of the likeliest token")
    engine: Literal["auto", "plain", "continuous", "vllm"] = Field(
        "auto", description="who writes completions; auto measures transformers' plain and continuous batching"
    )
    vllm: VLLM | None = Field(None, description="engine vllm: how it runs")
    sample_groups: Count = Field(
        8, description="prompts that the base answers before training, to show the rewards and measure the engines"
    )
    show_every: Count = Field(10, description="steps between kept sample completions")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [term.name for term in self.rewards]
        if twice := sorted({name for name in names if names.count(name) > 1 and name != "function"}):
            raise ValueError(f"the reward {twice[0]} is listed twice; give it one weight")
        if self.vllm is not None and self.engine != "vllm":
            raise ValueError("method.vllm says how vLLM runs: set engine: vllm, or leave it out")
        if wrong := _level(self.loss, self.importance_sampling):
            raise ValueError(wrong)
        if self.delta is not None and self.delta <= 1 + (self.epsilon_high or self.epsilon):
            raise ValueError("delta must lie above 1 + epsilon_high, or it hides that limit")
        return self


def _level(loss: GRPOLoss, level: str) -> str | None:
    """Why a loss does not go with a level of the probability ratio; None where it does."""
    if loss == "luspo" and level == "token":
        return "the loss luspo is of whole sequences: set importance_sampling: sequence"
    if loss == "vespo" and level == "sequence":
        return "the loss vespo makes sequence weights itself: leave importance_sampling out"
    if loss in {"dapo", "bnpo", "dr_grpo", "cispo"} and level == "sequence":
        return (
            f"with importance_sampling: sequence the loss {loss} would weigh a sequence by its length: set loss: grpo "
            "(GSPO), or leave importance_sampling out"
        )
    return None


class _Distill(_Method):
    """Learning from a teacher; the modes are the classes below."""

    kinds: ClassVar[tuple[RowKind, ...]] = ("prompt", "chat")
    type: Literal["distill"] = Field(description="distillation: the student learns from the recipe's teacher")


class DistillSequence(_Distill):
    """Supervised fine-tuning on the teacher's answers (sequence-level distillation, Kim and Rush 2016)."""

    mode: Literal["sequence"] = Field("sequence", description="on the answers that the teacher wrote")


class DistillLogits(_Distill):
    """The teacher's distributions, kept beforehand, as soft targets (Hinton et al. 2015)."""

    mode: Literal["logits"] = Field(description="on the teacher's distributions, from the cache in logits/")
    answers: Literal["teacher", "given"] = Field(
        "teacher", description="whose tokens are walked along: the teacher writes them, or the rows have them"
    )
    cross_entropy: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.1, description="share of the plain loss on the tokens; the rest is the divergence from the teacher"
    )

    @property
    def kinds(self) -> tuple[RowKind, ...]:  # type: ignore[override]
        return ("chat",) if self.answers == "given" else ("prompt", "chat")


class DistillOnPolicy(_Distill):
    """The student's own answers, marked token by token by the teacher (Agarwal et al. 2024, "GKD")."""

    mode: Literal["on_policy"] = Field(description="on the student's own answers, under the teacher at work beside it")
    beta: Annotated[Float, Field(ge=0, le=1)] = Field(
        1.0, description="the divergence: 1 reverse KL, 0 forward KL, between them generalised Jensen-Shannon"
    )
    prompts_per_step: Count = Field(16, description="prompts in one optimiser step, over all devices")
    max_new_tokens: Count = Field(256, description="longest completion")
    temperature: Positive = Field(1.0, description="of the sampling, and of both softmaxes in the loss")
    top_p: Annotated[Float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling; 1: off")
    top_k: Annotated[Int, Field(ge=0)] = Field(0, description="sampling among the k likeliest tokens; 0: off")
    vllm: VLLM | None = Field(None, description="the student's completions by vLLM")
    cross_tokenizer: Bool = Field(
        False, description="experimental: teacher and student with different tokenizers (TRL's GOLD)"
    )


class DistillPreference(_Distill):
    """Direct preference optimisation of the teacher's answers over the student's."""

    mode: Literal["preference"] = Field(description="on pairs of an answer of the teacher and one of the student")
    pairs: Literal["teacher", "judged"] = Field(
        "teacher", description="teacher: its answer is the chosen one; judged: teacher.verify decides among all answers"
    )
    student_samples: Count = Field(1, description="answers of the student to every prompt")
    dpo: DPO = Field(default_factory=lambda: DPO(type="dpo"), description="how the pairs are learnt; as method dpo")


Distill = Annotated[DistillSequence | DistillLogits | DistillOnPolicy | DistillPreference, Field(discriminator="mode")]
Method = Annotated[SFT | DPO | KTO | ORPO | RewardModel | GRPO | Distill, Field(discriminator="type")]
METHODS = ("sft", "dpo", "kto", "orpo", "reward", "grpo", "distill")
MODES = ("sequence", "logits", "on_policy", "preference")
