"""The generate stage: prompts -> the teacher's answers -> the student's rows -> the teacher's distributions of them.

The story of the stage, from top to bottom. Nothing here is lost by a crash: every answer is in the journal before it is
used, and a rerun asks only for what is not there.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.assemble import read_rows
from data_prep.earlier_teacher import IDENTITY
from data_prep.held_out import choose_rows
from data_prep.identity import teacher_ref
from data_prep.mask_pass import HELD_OUT
from data_prep.pairing import load_teacher_tokenizer, require_pair
from data_prep.prepare import Prepared, prepare
from data_prep.rows import Message, Row, before_answer
from distill import answers, pairs, scoring
from distill.answers import Work
from distill.filters import Candidate, Judged, Verify, judge
from distill.http_watch import SERVED
from distill.journal import JOURNAL, Journal
from distill.meter import Meter
from distill.rounds import Asked, Asker, Thread, going_on, student_row
from distill.sessions import Session, seconds_of
from distill.teachers import Completion, Teacher, identity_of, open_teacher
from recipes.errors import EngineError, RecipeError
from recipes.evidence import Asset
from recipes.gate import examine
from recipes.lineage import writing
from recipes.presets import resolve
from recipes.schema import Recipe
from recipes.schema_teacher import Round
from recipes.student import PROMPT, REFERENCE, ROWS, TEACHER, rows_folder, scored, waits
from recipes.verdict import Verdict

Say = Callable[[str], None]
Shard = tuple[int, int]  # (number from 1, of how many)


@dataclass
class Stage:
    """The stage under way.

    Attributes:
        tokenizer: the teacher's (transformers), None where it is not at hand.
        opened: the engine, once something had to be asked.
    """

    recipe: Recipe
    shard: Shard
    say: Say
    tokenizer: Any | None
    identity: dict[str, Any]
    sampling: dict[str, float]
    journal: Journal
    work: Work = field(default_factory=Work)
    opened: Teacher | None = None
    captured: scoring.Capture | None = None

    def __post_init__(self) -> None:
        assert self.recipe.teacher is not None
        engine = self.recipe.teacher.engine.name
        self.session = Session(self.folder, engine, self.shard, lambda: self.journal.calls_made)

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir / TEACHER

    def engine(self) -> Teacher:
        if self.opened is None:
            assert self.recipe.teacher is not None
            self.session.start()
            self.say(f"starting the teacher: {self.recipe.teacher.model} ({self.recipe.teacher.engine.name})")
            self.opened = open_teacher(self.recipe, self.tokenizer, self.folder / SERVED)
        return self.opened

    def answered(self, asked: Sequence[Asked], what: str) -> Iterator[tuple[Asked, Completion]]:
        """The answers to questions, in the questions' order."""
        by_key = {one.request.key: one for one in asked}
        found: dict[str, Completion] = {}
        self.work.requests += len(asked)
        requests = [one.request for one in asked]
        with Meter(what, len(asked), self.say) as meter:
            for completion in self.journal.run(requests, self.engine):
                if completion.sparse is not None and self.captured is not None:
                    self.captured.add(by_key[completion.key].request, completion)
                found[completion.key] = replace(completion, sparse=None)
                meter.step(completion.completion_tokens)
        self.work.completions |= found
        for one in asked:
            yield one, found[one.request.key]

    def stop_capturing(self) -> None:
        if self.captured is not None:
            self.captured.close()
        self.captured = None

    def close(self) -> None:
        try:
            self.stop_capturing()
            if self.opened is not None:
                self.opened.close()
        finally:
            self.session.close()


def generate(recipe: Recipe, verify: Verify | None = None, shard: Shard = (1, 1), say: Say = print) -> dict[str, Any]:
    """Have the teacher write (and score) what the student will learn. Returns the stage's figures (stats.json).

    Args:
        verify: marks answers by the recipe's reward functions (teacher.verify).
        shard: do every n-th prompt alone, on one of n machines; a last call without it puts the parts together.

    Raises:
        GateError: a licence forbids it. RecipeError: teacher and student do not fit together. DataError: prompts that
        cannot be read. EngineError: the teacher fails.
    """
    verdict, assets = examine(recipe)
    verdict.require()
    if recipe.method.type != "distill":
        raise RecipeError(f"method {recipe.method.type} has no teacher", "method", "retort train RECIPE trains it")
    sampling, words = resolve(recipe)
    prompts = _prompts(recipe)
    tokenizer = load_teacher_tokenizer(recipe)
    assert recipe.teacher is not None
    ref = teacher_ref(recipe.teacher.model)
    if ref is not None and ref.kind == "hub":  # judged by its name so far; now by those of its files that are here
        verdict, assets = examine(recipe)
        verdict.require()
    rows, held_out = _rows(recipe, prompts)
    chats = [before_answer(row.messages) for row in rows]
    for note in require_pair(
        recipe, prompts.tokenizer, tokenizer, chats, [list(row.tools or ()) or None for row in rows]
    ):
        say(f"note: {note}")
    say(f"sampling: {words}")
    folder = recipe.run_dir / TEACHER
    identity = identity_of(recipe)
    backend = tokenizer.backend if tokenizer is not None else None
    with Journal(folder / JOURNAL, shard) as journal:
        answers.write_json(folder / IDENTITY, identity)
        for note in journal.notes:
            say(f"note: {note}")
        stage = Stage(recipe, shard, say, backend, identity, sampling, journal)
        try:
            stats = _run(stage, rows, held_out, prompts, verify, verdict, assets, words)
        finally:
            for note in getattr(stage.opened, "notes", ()):
                say(f"note: {note}")
            stage.close()
        if shard == (1, 1):
            stats |= answers.costs(recipe, journal.paid, seconds_of(folder))
            answers.write_json(folder / "stats.json", stats)
    return stats


def _run(
    stage: Stage,
    rows: list[Row],
    held_out: list[Row],
    prompts: Prepared,
    verify: Verify | None,
    verdict: Verdict,
    assets: Sequence[Asset],
    words: str,
) -> dict[str, Any]:
    recipe, folder, whole = stage.recipe, stage.folder, stage.shard == (1, 1)
    number, of = stage.shard
    mine = [row for row in rows if int(row.id, 16) % of == number - 1]
    stage.captured = scoring.capture(recipe, prompts.tokenizer, stage.identity, stage.shard)
    judged = Judged([], [], {}, {})
    if waits(recipe):
        candidates = list(_ask_all(stage, mine))
        students = pairs.student_answers(recipe, mine, stage.shard, stage.say) if pairs.needed(recipe) else {}
        stage.stop_capturing()
        if whole:
            judged = judge(candidates, recipe, verify, held_out)
            _write_student_rows(stage, judged, students, verify, prompts, verdict, assets)
    if whole:
        teacher_says = _ask_held_out(stage, held_out)
        _write_held_out(stage, held_out, teacher_says, prompts, verdict, assets)
    stats = answers.statistics(stage.work, judged, stage.journal.calls_made, stage.journal.from_journal)
    if not whole:
        stage.say(f"shard {number} of {of} is in the journal; the last step is the command without --shard")
        if scored(recipe) and (folder / "manifest.json").is_file():
            scoring.score_rows(stage, verdict)
        return stats
    if waits(recipe):
        answers.write_json(folder / "summary.json", answers.summary(recipe, stage.work, judged, words))
        rejects = [answers.reject_line(*item) for item in judged.rejected]
        answers.write_lines(folder / "rejected.jsonl", [*rejects, *stage.work.rejected_early])
    answers.write_json(folder / "stats.json", stats)  # written again with its costs when the last row is scored
    answers.finish(folder, recipe, verdict, assets, prompts.folder, stats)
    if scored(recipe):
        scoring.score_rows(stage, verdict)
    return stats


def _prompts(recipe: Recipe) -> Prepared:
    """The prepared prompts; several shards that begin at once prepare them one after the other."""
    with _alone(recipe.run_dir / TEACHER):
        return prepare(recipe, recipe.run_dir, folder=rows_folder(recipe, recipe.run_dir))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("a")
    with stream:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _rows(recipe: Recipe, prompts: Prepared) -> tuple[list[Row], list[Row]]:
    """Rows to ask about, and the held-out ones; whole, with their answers where they have some."""
    asked = read_rows(prompts.folder, "train") + read_rows(prompts.folder, "requests")
    train = [_row(stored) for stored in asked if HELD_OUT not in (stored["extra"] or {})]
    held_out = [_row(stored) for stored in asked if HELD_OUT in (stored["extra"] or {})]
    if recipe.data.eval is not None and not recipe.data.requests:
        measured, watched = choose_rows(read_rows(prompts.folder, "eval"), recipe)
        seen = {row["_id"] for row in measured}
        held_out += [_row(stored) for stored in [*measured, *(w for w in watched if w["_id"] not in seen)]]
    if not train and waits(recipe):
        raise EngineError("there is no prompt to ask the teacher", str(prompts.folder), "look at data.train")
    return train, held_out


def _row(stored: dict[str, Any]) -> Row:
    row = Row(
        stored["_source"],
        tuple(stored["messages"] or ()),
        tools=tuple(stored["tools"]) if stored["tools"] else None,
        extra={**(stored["extra"] or {}), PROMPT: stored["_id"]},
        grouped=stored["_group"],
    )
    row.__dict__["id"] = stored["_id"].partition("-")[0]  # the prepared one: answers of equal prompts are told apart
    return row


def _thread(row: Row) -> Thread:
    reference = row.reference if row.kind == "chat" else None
    prompt = replace(row, messages=before_answer(row.messages), grouped=row.group)
    return Thread(prompt, row.id, reference)


def _ask_all(stage: Stage, rows: Sequence[Row]) -> Iterator[Candidate]:
    """All rounds about all rows; what the last one answers."""
    teacher = stage.recipe.teacher
    assert teacher is not None
    asker = Asker(stage.recipe, stage.identity, stage.tokenizer, stage.sampling)
    threads = [_thread(row) for row in rows]
    for number, asked in enumerate(teacher.rounds, 1):
        last = number == len(teacher.rounds)
        samples = asked.samples or (teacher.samples if last else 1)
        what = f"round {number} of {len(teacher.rounds)} ({asked.write})" if len(teacher.rounds) > 1 else "answers"
        following: list[Thread] = []
        for one, completion in stage.answered(asker.ask(asked, threads, samples), what):
            for thread in one.threads:
                if last:
                    yield _candidate(asked, thread, one.sample, completion)
                    continue
                went_on = list(going_on(asked, thread, completion))
                following += went_on
                if not went_on:
                    reason = "truncated" if completion.truncated else "empty"
                    stage.work.rejected_early.append(_early(number, thread, reason, completion))
        threads = following


def _candidate(asked: Round, thread: Thread, sample: int, completion: Completion) -> Candidate:
    row = student_row(asked, thread)
    row = replace(row, extra={**row.extra, PROMPT: thread.prompt}, grouped=thread.row.group)
    return Candidate(row, completion, sample, thread.reference)


def _early(number: int, thread: Thread, reason: str, completion: Completion) -> dict[str, Any]:
    return {
        "reason": f"round_{number}_{reason}",
        "prompt": thread.row.prompt,
        "completion": completion.text,
        "finish": completion.finish,
        PROMPT: thread.prompt,
        "_gen": completion.key,
    }


def _write_student_rows(
    stage: Stage,
    judged: Judged,
    students: dict[str, list[Completion]],
    verify: Verify | None,
    prompts: Prepared,
    verdict: Verdict,
    assets: Sequence[Asset],
) -> None:
    recipe, teacher = stage.recipe, stage.recipe.teacher
    assert teacher is not None
    renders = _renders_thinking(prompts)
    made: list[dict[str, Any]] = []
    if pairs.needed(recipe):
        made = pairs.make_pairs(recipe, judged, students, verify, renders)
    else:
        for candidate in judged.kept:
            message = answers.answer_message(candidate, teacher.keep_thinking, renders)
            made.append(answers.taught(candidate, teacher.model, message))
    if not made:
        reasons = ", ".join(f"{n} {reason}" for reason, n in judged.rejected_counts.items()) or "nothing was answered"
        remedy = "look at teacher/rejected.jsonl, and at teacher.filters"
        answers.write_lines(stage.folder / "rejected.jsonl", [answers.reject_line(*item) for item in judged.rejected])
        raise EngineError(f"none of the teacher's answers is left ({reasons})", str(stage.folder), remedy)
    answers.write_rows(stage.folder, ROWS[0], made, recipe, verdict, assets, prompts.folder)


def _renders_thinking(prompts: Prepared) -> bool:
    template = str(prompts.tokenizer.backend.chat_template)
    return "reasoning_content" in template or ".thinking" in template


def _ask_held_out(stage: Stage, held_out: Sequence[Row]) -> dict[str, Completion]:
    """The teacher's own greedy answers to held-out prompts, by the prompt's id."""
    teacher = stage.recipe.teacher
    assert teacher is not None
    if not held_out:
        return {}
    asker = Asker(stage.recipe, stage.identity, stage.tokenizer, {"temperature": 0.0})
    asked = teacher.rounds[0] if len(teacher.rounds) == 1 else Round()
    found = {}
    for one, completion in stage.answered(asker.ask(asked, [_thread(row) for row in held_out], 1), "held-out answers"):
        for thread in one.threads:
            found[thread.prompt] = completion
    return found


def _write_held_out(
    stage: Stage,
    held_out: Sequence[Row],
    teacher_says: dict[str, Completion],
    prompts: Prepared,
    verdict: Verdict,
    assets: Sequence[Asset],
) -> None:
    recipe = stage.recipe
    if recipe.data.eval is None:
        return
    assert recipe.teacher is not None
    lines, rows = [], []
    students = pairs.student_held_out(recipe, held_out, stage.say) if pairs.needed(recipe) else {}
    renders = _renders_thinking(prompts)
    for row in held_out:
        completion, thread = teacher_says[row.id], _thread(row)
        said = Candidate(thread.row, completion, 0)
        line = {PROMPT: row.id, "group": row.group, "answer": said.answer, "reference": thread.reference}
        lines.append({**line, "truncated": completion.truncated, "tokens": completion.completion_tokens})
        reference = thread.reference or said.answer
        wanted = answers.answer_message(said, recipe.teacher.keep_thinking, renders)
        if completion.truncated or not (said.answer or completion.tool_calls):  # no text that a student should learn
            wanted = {"role": "assistant", "content": thread.reference}
            if not thread.reference:
                continue
        if not pairs.needed(recipe):
            rows.append(answers.held_out_row(thread.row, wanted, reference))
        elif (own := students.get(row.id)) and own != wanted["content"]:
            rejected: Message = {"role": "assistant", "content": own}
            made = answers.pair(thread.row, wanted, rejected, recipe.teacher.model, completion.key)
            rows.append({**made, REFERENCE: reference})
    answers.write_lines(stage.folder / "answers.jsonl", lines)
    if waits(recipe):
        answers.write_rows(stage.folder, ROWS[1], rows, recipe, verdict, assets, prompts.folder)
