"""The teacher's distributions of the student's rows: kept while it writes, and scored where they were not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.assemble import read_rows
from data_prep.logit_cache import LogitWriter, row_key
from data_prep.prepare import prepare
from data_prep.tokens import Tokenizer
from distill.meter import Meter
from distill.teachers import Completion, Request
from recipes.schema import Recipe
from recipes.student import LOGITS, scored, student_recipe
from recipes.verdict import Verdict

if TYPE_CHECKING:
    from distill.generate import Shard, Stage

Row = dict[str, Any]


@dataclass
class Capture:
    """Distributions that come with the answers, on their way into the cache."""

    writer: LogitWriter

    def add(self, request: Request, completion: Completion) -> None:
        """Keep those of one answer, under the name that the same tokens have as a row of the student."""
        if request.prompt_ids is None or completion.token_ids is None or completion.sparse is None:
            return
        ids = [*request.prompt_ids, *completion.token_ids]
        mask = [False] * len(request.prompt_ids) + [True] * len(completion.token_ids)
        self.writer.add(row_key(ids, mask), completion.sparse)

    def close(self) -> None:
        self.writer.close(finished=False)


def about(recipe: Recipe, tokenizer: Tokenizer, identity: dict[str, Any]) -> dict[str, Any]:
    """What the cached distributions are of; another teacher, kind or vocabulary is another cache."""
    assert recipe.teacher is not None and recipe.teacher.logits is not None
    spec = recipe.teacher.logits.model_dump(mode="json")
    spec.pop("while_generating")
    return {"teacher": identity, "logits": spec, "vocabulary": len(tokenizer.backend), "seed": recipe.seed}


def capture(recipe: Recipe, tokenizer: Tokenizer, identity: dict[str, Any], shard: Shard) -> Capture | None:
    """Where distributions go that come with the answers; None where none are wanted."""
    if not scored(recipe) or recipe.teacher is None or recipe.teacher.logits is None:
        return None
    if not recipe.teacher.logits.while_generating:
        return None
    return Capture(_writer(recipe, tokenizer, identity, shard))


def _writer(recipe: Recipe, tokenizer: Tokenizer, identity: dict[str, Any], shard: Shard) -> LogitWriter:
    number, of = shard
    name = "main" if of == 1 else f"shard{number}of{of}"
    return LogitWriter(recipe.run_dir / LOGITS, about(recipe, tokenizer, identity), writer=name)


def score_rows(stage: Stage, verdict: Verdict) -> None:
    """Score the student's rows that the cache does not have yet."""
    recipe = stage.recipe
    prepared = prepare(student_recipe(recipe, recipe.run_dir), recipe.run_dir)
    number, of = stage.shard
    rows = [row for row in read_rows(prepared.folder, "train") if int(row["_id"][:15], 16) % of == number - 1]
    keys = [row_key(row["input_ids"], row["loss_mask"]) for row in rows]
    writer = _writer(recipe, prepared.tokenizer, stage.identity, stage.shard)
    for note in writer.notes:
        stage.say(f"note: {note}")
    finished = False
    try:
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in writer.known}
        stage.say(f"distributions: {len(set(keys)) - len(missing):,} of {len(set(keys)):,} rows have them already")
        with Meter("rows scored", len(missing), stage.say) as meter:
            for key, row, sparse in _scores(stage, missing) if missing else ():
                writer.add(key, sparse)
                meter.step(sum(row["loss_mask"]))
        finished = of == 1
    finally:
        found = writer.close(finished, {"verdict": verdict.as_dict(), "recipe": recipe.resolved()})
    stage.say(
        f"logits: {found['rows']:,} rows, {found['positions']:,} tokens, {found['bytes_per_token']:.0f} bytes a "
        f"token, {found['head_mass']:.3f} of the teacher's mass among the kept tokens"
    )


def _scores(stage: Stage, missing: dict[str, Row]) -> Iterator[tuple[str, Row, Any]]:
    sequences = [(row["input_ids"], row["loss_mask"]) for row in missing.values()]
    for (key, row), sparse in zip(missing.items(), stage.engine().score(sequences), strict=True):
        yield key, row, sparse
