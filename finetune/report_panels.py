"""Which charts the report draws of a run's series, in which groups, and what it says of each: what healthy looks like.

A panel names series; those that a method does not log draw nothing, so most panels are listed for every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.comparison import METRIC_NAMES, PERCENT
from finetune.report_method import method_of, rewards_of
from finetune.run_files import RunFiles, count, dig, number

MOST_OTHERS = 12
REWARD = "reward/"
TOLD_ELSEWHERE = {"step", "epoch", "seconds", "tokens_seen"}


@dataclass(frozen=True)
class Panel:
    """One chart before it is drawn.

    Attributes:
        curves: (key in metrics.jsonl, name in the legend) each.
        note: what is drawn, and what healthy looks like.
        held_out: the metric measured on held-out rows that is drawn with it.
        kind: how values are worded: `share`, `bytes`, `whole`, or a plain number.
        word: which value stands beside the title: `last`, `peak` or `median`.
    """

    title: str
    curves: tuple[tuple[str, str], ...]
    note: str
    held_out: str = ""
    kind: str = ""
    from_zero: bool = False
    smooth: bool = False
    word: str = "last"


def panels(run: RunFiles) -> tuple[Panel, list[tuple[str, list[Panel]]]]:
    """The panel that leads, which is drawn wide, and all others in groups with a title."""
    kind, keys = method_of(run).kind, list(dict.fromkeys(key for line in run.training for key in line))
    loss, rewards = _loss(kind), _rewards(run, keys)
    groups = [
        ("Teacher and student", _taught(run)),
        ("Signal", list(SIGNAL)),
        ("Completions", _completions(run)),
        ("Policy", _policy(run) if rewards else []),
        ("Preferences", _preferences(run)),
        ("Optimisation", [*([loss] if rewards else []), *OPTIMISATION, *([] if rewards else [_entropy(run)])]),
    ]
    lead = rewards or loss
    drawn = [lead, *(panel for _, found in groups for panel in found)]
    groups.insert(5, ("Held-out rows", _held_out(run, {panel.held_out for panel in drawn})))
    known = TOLD_ELSEWHERE | {key for panel in drawn for key, _ in panel.curves}
    others = [key for key in keys if key not in known and not key.startswith(REWARD)][:MOST_OTHERS]
    groups.append(("Further series", [Panel(_spelt(key), ((key, ""),), "") for key in others]))
    return lead, groups


def _spelt(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _loss(kind: str) -> Panel:
    """The held-out loss is of the same kind only where the training loss is that of the answers themselves."""
    notes = {
        "sft": "Falls fast, then levels off. A held-out loss that rises again means that rows are learnt by heart.",
        "grpo": "Moves around zero and is no measure of progress: the rewards are.",
        "orpo": "The imitation loss and the odds ratio together. Healthy: falls, then levels off.",
        "logits": "Divergence from the teacher and cross-entropy, weighted. Healthy: falls, levels off above zero.",
        "on_policy": "Divergence from the teacher on the student's own answers, in nats per token. Healthy: falls.",
    }
    note = notes.get(kind, "Healthy: falls from the start on. Whether pairs are told apart shows below.")
    held_out = "" if kind in ("dpo", "kto", "orpo", "reward", "grpo", "logits", "on_policy") else "loss"
    return Panel("Training loss", (("loss", ""),), note if kind else "", held_out, smooth=True)


def _rewards(run: RunFiles, keys: Sequence[str]) -> Panel | None:
    """The sum and every reward on one axis; None where no rewards were logged."""
    logged = {key.removeprefix(REWARD) for key in keys if key.startswith(REWARD)}
    if not logged and "reward" not in keys:
        return None
    asked = {term.name: term.weight for term in rewards_of(run)}
    names = [*(name for name in asked if name in logged), *(k for k in sorted(logged) if k not in asked)]
    note = "Mean over the completions of a step. Healthy: rises, then levels off"
    note += "; held-out answers are greedy." if any("eval_reward" in line for line in run.measured) else "."
    if len(names) == 1 and asked.get(names[0]) == 1:  # the sum is that one reward
        return Panel(f"Reward: {names[0]}", (("reward", ""),), note, "reward", from_zero=True, smooth=True)
    curves = (("reward", "weighted sum"), *((f"{REWARD}{name}", name) for name in names))
    if len(names) > 1:
        note += " A reward that rises while others fall is bought at their expense."
    return Panel("Rewards", curves, note, "reward", from_zero=True, smooth=True)


SIGNAL = (
    Panel(
        "Groups without a difference",
        (("zero_variance_groups", ""),),
        "Groups whose completions all earn the same: they teach nothing. Healthy: well below half.",
        kind="share",
        from_zero=True,
    ),
    Panel(
        "Spread of the reward",
        (("reward_std", ""),),
        "Standard deviation over all completions of a step. Healthy: well above zero.",
        from_zero=True,
    ),
)


def _taught(run: RunFiles) -> list[Panel]:
    """How near the student is to the distributions of its teacher, at the tokens of a step."""
    sampled = dig(run.recipe, "teacher", "logits", "kind") == "sampled"
    over = "over tokens that were drawn of it" if sampled else "over the kept tokens and the rest as one"
    return [
        Panel(
            "Divergence from the teacher",
            (("divergence", ""),),
            f"Kullback-Leibler, {over}, in nats per token. Healthy: falls towards zero.",
            from_zero=not sampled,
            smooth=True,
        ),
        Panel(
            "Agreement",
            (("agreement", ""),),
            "Tokens where the student's likeliest choice is the teacher's. Healthy: rises.",
            kind="share",
            from_zero=True,
            smooth=True,
        ),
        Panel(
            "Probability on the kept tokens",
            (("student_head_mass", "student"), ("head_mass", "teacher")),
            "Healthy: the student rises to its teacher. Above it, the student is surer of them than the teacher was.",
            kind="share",
            smooth=True,
        ),
        Panel(
            "Calibration error",
            (("calibration_error", ""),),
            "Between how sure the student is of its likeliest token and how often that one is written. Healthy: low.",
            kind="share",
            from_zero=True,
            smooth=True,
        ),
        Panel(
            "Cross-entropy",
            (("token_loss", ""),),
            "Of the tokens that are written, in nats. Healthy: falls; what the teacher doubts remains in it.",
            "loss" if method_of(run).kind == "logits" else "",
            smooth=True,
        ),
        Panel(
            "Loss of matched and of other tokens",
            (("matched_loss", "both have it"), ("unmatched_loss", "one has it")),
            "GOLD, across tokenizers: by likelihood where both have the token, by rank elsewhere. Healthy: both fall.",
            smooth=True,
        ),
    ]


def _completions(run: RunFiles) -> list[Panel]:
    most = number(dig(run.recipe, "method", "max_new_tokens"))
    cut = f"Cut at {count(most)} tokens" if most is not None else "Cut at the longest length"
    grows = "Healthy: grows only where the reward does; else a reward pays for length."
    if method_of(run).kind == "on_policy":
        grows = "Healthy: comes near the length of the teacher's answers."
    return [
        Panel(
            "Completion length",
            (("completion_length", ""),),
            f"Mean, in tokens. {grows}",
            from_zero=True,
        ),
        Panel(
            "Truncated completions",
            (("truncated_share", ""),),
            f"{cut}. Healthy: near zero.",
            kind="share",
            from_zero=True,
        ),
    ]


def _entropy(run: RunFiles) -> Panel:
    note = "How open the next token is, in nats. Healthy: settles; at zero the model no longer doubts."
    if method_of(run).writes_itself:
        note = "Of the completions, in nats per token. Healthy: falls slowly; at zero all are alike."
    return Panel("Entropy", (("entropy", ""),), note, from_zero=True)


def _kl(note: str) -> Panel:
    return Panel("KL to the start", (("kl", ""),), note, from_zero=True)


def _policy(run: RunFiles) -> list[Panel]:
    return [
        _entropy(run),
        _kl("In nats per token. Healthy: rises slowly; a steep climb means that the model leaves what it knew."),
        Panel(
            "Clipped share",
            (("clipped_share", ""),),
            "Tokens whose update was cut off by epsilon. Healthy: a few percent at most.",
            kind="share",
            from_zero=True,
        ),
        Panel(
            "Engine against trainer",
            (("engine_logp_difference", ""),),
            "Mean difference of a token's log-probability between the two. Healthy: near zero, and flat.",
            from_zero=True,
        ),
    ]


def _preferences(run: RunFiles) -> list[Panel]:
    kind = method_of(run).kind
    # TRL's reward of an answer differs by method, and so does the held-out metric that is the same as its accuracy.
    compared = {
        "orpo": ("is the likelier one per token", "preference_accuracy"),
        "reward": ("gets the higher score", "preference_accuracy"),
    }
    how, held_out = compared.get(kind, ("gained more than the rejected one", "reward_accuracy"))
    moved = "beta × log-probability per token" if kind == "orpo" else "beta × gain in log-probability over the start"
    per = "per token" if kind == "orpo" else "per answer"
    imitates = kind == "orpo" and dig(run.recipe, "method", "imitate") != "all"
    return [
        Panel(
            "Reward accuracy",
            (("reward_accuracy", ""),),
            f"Pairs whose chosen answer {how}. Healthy: rises above 50%, held out too.",
            held_out,
            kind="share",
            from_zero=True,
            smooth=True,
        ),
        Panel(
            "Margin",
            (("reward_margin", ""),),
            "Reward of the chosen answer minus the rejected one's. Healthy: rises, then levels off.",
            from_zero=True,
            smooth=True,
        ),
        Panel(
            "Rewards of chosen and rejected answers",
            (("reward_chosen", "chosen"), ("reward_rejected", "rejected")),
            f"{moved[0].upper()}{moved[1:]}. Healthy: they part, and the chosen one does not sink.",
        ),
        Panel(
            "Log-probability of chosen and rejected answers",
            (("logp_chosen", "chosen"), ("logp_rejected", "rejected")),
            f"In nats {per}. Healthy: the rejected ones sink; chosen ones that sink with them are unlearnt.",
        ),
        Panel(
            "Imitation loss",
            (("imitation_loss", ""),),
            "Of the chosen answers, per token. Healthy: falls as in supervised fine-tuning.",
            "loss" if imitates else "",
            smooth=True,
        ),
        Panel(
            "Log odds ratio",
            (("log_odds_ratio", ""),),
            "Log-sigmoid of the chosen over the rejected answer's odds. Healthy: rises towards zero.",
            from_zero=True,
        ),
        *([] if kind == "grpo" else [_kl("What gains are measured against, in nats. Healthy: stays small.")]),
    ]


OPTIMISATION = (
    Panel(
        "Learning rate",
        (("learning_rate", ""),),
        "Rises over the warm-up, then follows the schedule.",
        from_zero=True,
        word="peak",
    ),
    Panel(
        "Gradient norm",
        (("grad_norm", ""),),
        "Before clipping. Healthy: settles; spikes point to odd rows or too high a rate.",
        from_zero=True,
        word="median",
    ),
    Panel(
        "Tokens per second",
        (("tokens_per_second", ""),),
        "Healthy: steady.",
        kind="whole",
        from_zero=True,
        word="median",
    ),
    Panel(
        "Memory",
        (("memory_bytes", ""),),
        "Peak so far. Healthy: level after the first steps.",
        kind="bytes",
        from_zero=True,
        word="peak",
    ),
)


def _held_out(run: RunFiles, told: set[str]) -> list[Panel]:
    """What was measured on held-out rows and answers to no series of the training."""
    found = {key.removeprefix("eval_") for line in run.measured for key in line if key.startswith("eval_")} - told
    notes: dict[str, Any] = {
        "loss": "Of the chosen answers, per token; not the training loss. Rises where good answers are unlearnt.",
        "preference_accuracy": "Pairs whose chosen answer is the likelier one per token. Healthy: rises.",
        "reward_accuracy": "Pairs whose chosen answer gained more than the rejected one. Healthy: rises above 50%.",
        "perplexity": "Healthy: falls.",
    }
    return [
        Panel(
            METRIC_NAMES.get(name, _spelt(name)),
            (),
            notes.get(name, "Healthy: rises."),
            name,
            kind="share" if name in PERCENT else "",
            from_zero=name in PERCENT,
        )
        for name in [*(n for n in METRIC_NAMES if n in found), *sorted(found - METRIC_NAMES.keys())]
    ]
