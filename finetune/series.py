"""What is measured, under the names that dashboards keep: series of metrics.jsonl and figures of a run's summary."""

from __future__ import annotations

# Series of metrics.jsonl -> (name in the dashboard, unit, what it is).
SERIES: dict[str, tuple[str, str, str]] = {
    "loss": ("train/loss", "nats/token", "what the optimiser lowers; of preferences and rewards nats per row"),
    "learning_rate": ("train/learning_rate", "1", "step size of the optimiser"),
    "grad_norm": ("train/grad_norm", "1", "norm of the gradient before clipping"),
    "epoch": ("train/epoch", "epochs", "passes over the rows"),
    "tokens_seen": ("train/tokens_seen", "tokens", "read in training so far, padding left out"),
    "tokens_per_second": ("speed/tokens_per_second", "tokens/s", "of all devices together"),
    "mfu": ("speed/mfu", "share", "model FLOPs utilisation: of the cards' peak, 4 FLOPs per frozen weight"),
    "memory_bytes": ("memory/peak_bytes", "bytes", "peak of one device so far"),
    "reward": ("train/reward", "points", "weighted sum of the reward functions, mean over completions"),
    "reward_std": ("train/reward_std", "points", "its spread"),
    "zero_variance_groups": ("train/zero_variance_groups", "share", "groups whose completions all earned the same"),
    "kl": ("train/kl", "nats/token", "divergence from the model as it started"),
    "kl_per_token": ("train/kl_per_token", "nats/token", "of KTO, whose own is of whole answers"),
    "entropy": ("train/entropy", "nats/token", "of the model's next-token distribution"),
    "clipped_share": ("train/clipped_share", "share", "tokens whose policy ratio was clipped"),
    "completion_length": ("train/completion_length", "tokens", "mean length of completions"),
    "truncated_share": ("train/truncated_share", "share", "completions cut at the limit"),
    "engine_logp_difference": ("train/engine_logp_difference", "nats/token", "engine against trainer"),
    "reward_accuracy": ("train/reward_accuracy", "share", "pairs whose better answer has the higher reward"),
    "reward_margin": ("train/reward_margin", "nats", "chosen less rejected"),
    "reward_chosen": ("train/reward_chosen", "nats", "implicit reward of the better answer"),
    "reward_rejected": ("train/reward_rejected", "nats", "implicit reward of the worse answer"),
    "logp_chosen": ("train/logp_chosen", "nats", "log-probability of the better answer"),
    "logp_chosen_per_token": ("train/logp_chosen_per_token", "nats/token", "the same per token of the answer"),
    "logp_rejected": ("train/logp_rejected", "nats", "log-probability of the worse answer"),
    "imitation_loss": ("train/imitation_loss", "nats/token", "of the better answers"),
    "log_odds_ratio": ("train/log_odds_ratio", "nats", "of ORPO"),
    "divergence": ("teacher/divergence", "nats/token", "student from the teacher's distribution"),
    "token_loss": ("teacher/token_loss", "nats/token", "loss on the written tokens alone"),
    "head_mass": ("teacher/head_mass", "share", "the teacher's probability that the kept tokens hold"),
    "student_head_mass": ("teacher/student_head_mass", "share", "the student's probability of the same tokens"),
    "agreement": ("teacher/agreement", "share", "tokens whose likeliest continuation is the teacher's too"),
    "calibration_error": ("teacher/calibration_error", "share", "distance of the student's confidence"),
    "matched_loss": ("teacher/matched_loss", "nats/token", "tokens that both vocabularies have"),
    "unmatched_loss": ("teacher/unmatched_loss", "nats/token", "the others, by rank"),
}
OWN = {"step", "seconds"}  # wandb has its own
FOLDERS = {"eval_": "eval/", "reward/": "rewards/"}  # one series per metric of the recipe, per reward function
# Of the summary of a run, once: name -> (unit, what it is). `*` stands for a metric of the recipe, or a reason.
_ENDS = {"": "value on the held-out rows", "_low": "lower end of its interval", "_high": "upper end of its interval"}
SUMMARY: dict[str, tuple[str, str]] = {
    **{
        f"eval/*/{who}{end}": ("the metric's", f"{who}: {what}")
        for who in ("base", "tuned", "teacher")
        for end, what in _ENDS.items()
    },
    "eval/*/p_value": ("1", "of base against tuned, paired"),
    "eval/rows": ("rows", "held-out rows measured"),
    "eval/intervals": ("table", "all of the above as a table: metric, model, value, low, high"),
    "memory/predicted_bytes": ("bytes", "what the layout was planned with"),
    "memory/longest_batch_bytes": ("bytes", "peak of the longest batch, tried before the first step"),
    "data/rows_in": ("rows", "read"),
    "data/rows_out": ("rows", "left after all steps of preparation"),
    "data/dropped/*": ("rows", "dropped, by reason"),
    "data/train_rows": ("rows", "to train on"),
    "data/eval_rows": ("rows", "held out"),
    "data/train_tokens": ("tokens", "of the training rows"),
    "data/trained_tokens": ("tokens", "of those in the loss"),
    "gate/verdict": ("text", "allow, allow-with-obligations, review, block, or not judged"),
    "gate/obligations": ("duties", "that travel with the model"),
    "teacher/candidates": ("answers", "that were judged"),
    "teacher/kept": ("answers", "that passed all filters"),
    "teacher/rejected/*": ("answers", "dropped, by reason"),
    "teacher/prompt_tokens": ("tokens", "read by the teacher"),
    "teacher/completion_tokens": ("tokens", "written by the teacher"),
    "teacher/seconds": ("seconds", "of asking, all sessions"),
    "teacher/cost": ("the recipe's currency", "of the tokens and hours at the recipe's prices"),
}


def name_of(key: str) -> str:
    """The name of a series of metrics.jsonl in the dashboard: by kind, else under train/."""
    if key in SERIES:
        return SERIES[key][0]
    start = next((start for start in FOLDERS if key.startswith(start)), "")
    return FOLDERS.get(start, "train/") + key.removeprefix(start)
