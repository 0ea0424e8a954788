"""The method of a run in words, for its report and its model card: names, settings, rewards, and the run before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from finetune.run_files import DASH, RunFiles, count, dig, number
from recipes.schema_rewards import RewardTerm

# Short name, the name in full, and how a model is said to be trained.
METHODS = {
    "sft": ("SFT", "supervised fine-tuning", "with SFT"),
    "dpo": ("DPO", "direct preference optimisation", "with DPO"),
    "kto": ("KTO", "Kahneman-Tversky optimisation", "with KTO"),
    "orpo": ("ORPO", "odds-ratio preference optimisation", "with ORPO"),
    "reward": ("Reward model", "scores answers, learned from preferences", "as a reward model"),
    "grpo": ("GRPO", "group-relative policy optimisation", "with GRPO"),
}
# The same of the modes of a distillation, and the kind of training that each of them is.
MODES = {
    "sequence": ("sft", "Distillation (sequence)", "supervised fine-tuning on a teacher's answers"),
    "logits": ("logits", "Distillation (logits)", "soft targets from a teacher's distributions, kept beforehand"),
    "on_policy": ("on_policy", "Distillation (on policy)", "a teacher marks every token of the student's own answers"),
    "preference": ("dpo", "Distillation (preference)", "DPO of a teacher's answers over the student's"),
}


@dataclass(frozen=True)
class Method:
    """How a run trained.

    Attributes:
        kind: what its curves and figures are read as: the recipe's word, or of a distillation what its mode trains by:
            `sft`, `logits`, `on_policy` or `dpo`.
        trained: completes "a model, trained ...".
    """

    kind: str
    short: str
    full: str
    trained: str

    @property
    def writes_itself(self) -> bool:
        """Whether the rows are prompts, whose answers the model writes while it trains."""
        return self.kind in ("grpo", "on_policy")


def mode_of(run: RunFiles) -> str:
    """The mode of a distillation; empty where the run is none."""
    method = run.recipe.get("method")
    return str(dig(method, "mode") or "sequence") if dig(method, "type") == "distill" else ""


def method_of(run: RunFiles) -> Method:
    """The method that the recipe names; one that is not known here keeps its name."""
    if mode := mode_of(run):
        kind, short, full = MODES.get(mode, (mode, f"Distillation ({mode.replace('_', ' ')})", ""))
        return Method(kind, short, full, f"by d{short[1:]}")
    kind = str(dig(run.recipe, "method", "type") or "")
    short, full, trained = METHODS.get(kind, (kind.upper() or "training", "", f"with {kind.upper() or 'a recipe'}"))
    if kind == "sft" and dig(run.recipe, "method", "on") == "text":
        full = "continued pretraining on plain text"
    return Method(kind, short, full, trained)


@dataclass(frozen=True)
class Reward:
    """A reward of the recipe; `meaning` says what it pays for."""

    name: str
    weight: float
    meaning: str


def rewards_of(run: RunFiles) -> list[Reward]:
    """The rewards of a GRPO recipe, in its order, under the names that metrics.jsonl and rewards.json use."""
    found = []
    asked = dig(run.recipe, "method", "rewards")
    for entry in asked if isinstance(asked, (list, tuple)) else []:
        entry = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or len(entry) != 1:
            continue
        kind, options = str(next(iter(entry))), next(iter(entry.values()))
        path, weight = dig(options, "path"), number(dig(options, "weight"))
        name = str(path).rpartition(":")[2] if kind == "function" and path else kind
        found.append(Reward(name, 1.0 if weight is None else weight, _meaning(kind, options)))
    return found


def _meaning(kind: str, options: Any) -> str:
    """What the schema says of a reward, in its first sentence."""
    if kind == "function":
        return f"the user's own function {dig(options, 'path') or ''}".strip()
    field = RewardTerm.model_fields.get(kind)
    said = " ".join(((get_args(field.annotation)[0].__doc__ if field else "") or "").split())
    return said.split(". ")[0].rstrip(".")


def weighted(terms: list[tuple[str, float]]) -> str:
    """A weighted sum as it is written on paper: math + 0.3 × think."""
    return " + ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in terms)


def settings_of(run: RunFiles) -> Any:
    """The section of the recipe with the method's settings; pairs of a distillation are learnt by those of DPO."""
    method = run.recipe.get("method")
    return dig(method, "dpo") if mode_of(run) == "preference" else method


def loss_of(run: RunFiles) -> str:
    """The loss that a method was told to use, with weights where there are several; empty where it has no choice."""
    loss = dig(settings_of(run), "loss")
    if isinstance(loss, dict):
        return weighted([(str(name), number(weight) or 0.0) for name, weight in loss.items()])
    return str(loss) if loss else ""


def method_facts(run: RunFiles) -> list[tuple[str, str, str]]:
    """(term, value, hint) of what a reader has to know of the method beside its name."""
    method, kind = settings_of(run), method_of(run).kind
    facts = _taught_by(run)
    facts += [("Loss", loss, "")] if (loss := loss_of(run)) else []
    beta = number(dig(method, "beta"))
    if beta is not None:
        hint = "no reference" if dig(method, "reference_free") is True else ""
        hint = "no pull to the start" if kind == "grpo" and beta == 0 else hint
        hint = _divergence(beta) if kind == "on_policy" else hint
        facts.append(("Beta", f"{beta:g}", hint))
    prompts, generations = number(dig(method, "prompts_per_step")), number(dig(method, "generations"))
    if prompts is not None and (generations is not None or kind == "on_policy"):
        longest = number(dig(method, "max_new_tokens"))
        hint = f"of up to {count(longest)} tokens" if longest is not None else ""
        each = f" prompts × {count(generations)}" if generations is not None else ""
        facts.append(("Completions per step", f"{count(prompts)}{each}", hint))
    if terms := rewards_of(run):
        facts.append(("Rewards", weighted([(term.name, term.weight) for term in terms]), ""))
    return facts


def _taught_by(run: RunFiles) -> list[tuple[str, str, str]]:
    """Of a distillation: the teacher, what is kept of its distributions, and the share of the plain loss."""
    mode = mode_of(run)
    if not mode:
        return []
    facts = [("Teacher", str(dig(run.recipe, "teacher", "model") or DASH), "")]
    if mode == "logits":
        if said := kept_of_distributions(dig(run.recipe, "teacher", "logits")):
            facts.append(("Kept of each", said, ""))
        share = number(dig(run.recipe, "method", "cross_entropy"))
        facts += [("Cross-entropy", f"{100 * share:g}% of the loss", "")] if share is not None else []
    return facts


def kept_of_distributions(spec: Any) -> str:
    """What `teacher.logits` keeps of every distribution, in words."""
    kind, k, draws = dig(spec, "kind"), number(dig(spec, "k")), number(dig(spec, "draws"))
    warmth = number(dig(spec, "temperature"))
    at = f", at temperature {warmth:g}" if warmth is not None and warmth != 1 else ""
    if kind == "sampled":
        return f"{count(draws)} draws{at}"
    return f"the {count(k)} likeliest tokens and the rest's mass{at}" if kind == "topk" else ""


def _divergence(beta: float) -> str:
    """TRL's names of the divergences (generalised Jensen-Shannon; Agarwal et al. 2024, section 2)."""
    return {0.0: "forward KL", 1.0: "reverse KL"}.get(beta, "generalised Jensen-Shannon divergence")


@dataclass(frozen=True)
class Chain:
    """The run that this one started from; `said` names it, `how` says what became of its weights."""

    run: str
    merged: bool
    said: str
    how: str


def chain_of(run: RunFiles) -> Chain | None:
    """The earlier run of a recipe with model.run, or None."""
    earlier = dig(run.recipe, "model", "run")
    if not isinstance(earlier, str) or not earlier:
        return None
    if dig(run.recipe, "model", "merge") is True:
        new = "a new adapter on its merged weights" if run.adapter else "its merged weights are trained on"
        return Chain(earlier, True, f"on {earlier}, merged", new)
    same = "the same adapter is trained on" if run.adapter else "its weights are trained on"
    return Chain(earlier, False, f"continues {earlier}", same)
