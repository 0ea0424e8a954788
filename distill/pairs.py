"""Mode preference: answers of the student beside the teacher's, made into pairs of a chosen and a rejected one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.completions import split_thinking
from data_prep.rows import Row, before_answer
from data_prep.tokens import load_tokenizer
from distill.answers import answer_message, pair
from distill.filters import Candidate, Judged, Verify
from distill.journal import Journal
from distill.meter import Meter
from distill.rounds import Asker, Thread
from distill.teachers import Completion, Teacher, identity_of, open_teacher
from recipes.lineage import MANIFEST, sha256_file
from recipes.refs import path_of
from recipes.schema import Recipe
from recipes.schema_teacher import Engine, Round, TransformersEngine
from recipes.schema_teacher import Teacher as TeacherSection
from recipes.student import PROMPT, TEACHER

Say = Callable[[str], None]


def needed(recipe: Recipe) -> bool:
    """Whether the student has to answer too."""
    return recipe.method.type == "distill" and recipe.method.mode == "preference"


def student_answers(
    recipe: Recipe, rows: Sequence[Row], shard: tuple[int, int], say: Say
) -> dict[str, list[Completion]]:
    """The student's answers to prompts as it is before training, by the prompt's id, samples in order."""
    assert recipe.method.type == "distill" and recipe.method.mode == "preference"
    samples = recipe.method.student_samples
    return _ask(recipe, rows, samples, {"temperature": 1.0}, shard, say, "answers of the student")


def student_held_out(recipe: Recipe, rows: Sequence[Row], say: Say) -> dict[str, str]:
    """The student's greedy answers to held-out prompts, by the prompt's id."""
    found = _ask(recipe, rows, 1, {"temperature": 0.0}, (1, 1), say, "held-out answers of the student")
    return {key: split_thinking(several[0].text)[1] for key, several in found.items()}


def _ask(
    recipe: Recipe,
    rows: Sequence[Row],
    samples: int,
    sampling: dict[str, float],
    shard: tuple[int, int],
    say: Say,
    what: str,
) -> dict[str, list[Completion]]:
    as_teacher = _as_teacher(recipe)
    backend = load_tokenizer(recipe.model).backend
    identity = identity_of(as_teacher)
    if recipe.model.run is not None:
        identity = {**identity, "run": sha256_file(path_of(recipe.model.run) / MANIFEST)}
    asker = Asker(as_teacher, identity, backend, sampling)
    threads = [Thread(replace(row, messages=before_answer(row.messages), grouped=row.group), row.id) for row in rows]
    asked = {one.request.key: one for one in asker.ask(Round(), threads, samples)}
    found: dict[str, dict[int, Completion]] = {}
    opened: list[Teacher] = []

    def engine() -> Teacher:
        say(f"starting the student: {recipe.model.run or recipe.model.base}")
        opened.append(_opened(recipe, as_teacher, backend))
        return opened[0]

    folder = recipe.run_dir / TEACHER / "student"
    with Journal(folder, shard) as journal, Meter(what, len(asked), say) as meter:
        try:
            for completion in journal.run([one.request for one in asked.values()], engine):
                meter.step(completion.completion_tokens)
                one = asked[completion.key]
                for thread in one.threads:
                    found.setdefault(thread.prompt, {})[one.sample] = replace(completion, sparse=None)
        finally:
            for one_teacher in opened:
                for note in getattr(one_teacher, "notes", ()):
                    say(f"note: {note}")
                one_teacher.close()
    return {prompt: [several[n] for n in sorted(several)] for prompt, several in found.items()}


def _as_teacher(recipe: Recipe) -> Recipe:
    """The recipe with the student in the teacher's place."""
    assert recipe.teacher is not None
    model = recipe.model
    options = TransformersEngine(dtype=model.dtype, quantization=model.quantization, device=recipe.train.device)
    student = TeacherSection(
        model=model.base,
        tokenizer=model.tokenizer,
        template_kwargs=model.template_kwargs,
        engine=Engine(transformers=options),
        sampling=recipe.teacher.sampling,
    )
    return recipe.model_copy(update={"teacher": student})


def _opened(recipe: Recipe, as_teacher: Recipe, backend: Any) -> Teacher:
    made: Any = open_teacher(as_teacher, backend)
    adapter = path_of(recipe.model.run) / "adapter" if recipe.model.run is not None else None
    if adapter is not None and adapter.is_dir():
        from peft import PeftModel

        made.model = PeftModel.from_pretrained(made.model, adapter).eval()
    teacher: Teacher = made
    return teacher


@dataclass(frozen=True)
class _Side:
    """One answer that may be chosen or rejected."""

    candidate: Candidate
    teachers: bool
    mark: float


def make_pairs(
    recipe: Recipe, judged: Judged, students: dict[str, list[Completion]], verify: Verify | None, renders_thinking: bool
) -> list[dict[str, Any]]:
    """One pair for each prompt whose answers differ.

    With `pairs: teacher` the best kept answer of the teacher is chosen over the student's first one that is another.
    With `pairs: judged` all answers are marked by teacher.verify, and the highest is chosen over the lowest.
    """
    assert recipe.method.type == "distill" and recipe.method.mode == "preference" and recipe.teacher is not None
    by_prompt: dict[str, list[Candidate]] = {}
    for candidate in judged.kept:
        by_prompt.setdefault(candidate.row.extra[PROMPT], []).append(candidate)
    judges = recipe.method.pairs == "judged"
    made = []
    for prompt, kept in by_prompt.items():
        own = [replace(kept[0], completion=c, sample=n, tags={}) for n, c in enumerate(students.get(prompt, ()))]
        own = [c for c in own if c.answer and not c.completion.truncated]
        marks = _marks([*kept, *own], verify) if judges else [c.score or 0.0 for c in kept] + [0.0] * len(own)
        sides = [_Side(c, i < len(kept), mark) for i, (c, mark) in enumerate(zip([*kept, *own], marks, strict=True))]
        chosen = max(
            (s for s in sides if judges or s.teachers), key=lambda s: (s.mark, s.teachers, -s.candidate.sample)
        )
        others = [s for s in sides if s.candidate.answer != chosen.candidate.answer and (judges or not s.teachers)]
        if judges:
            others = [s for s in others if s.mark < chosen.mark]
        if not others:
            continue
        rejected = min(others, key=lambda s: (s.mark, s.teachers, s.candidate.sample))
        messages = [
            answer_message(s.candidate, recipe.teacher.keep_thinking, renders_thinking) for s in (chosen, rejected)
        ]
        writer = recipe.teacher.model
        made.append(pair(kept[0].row, messages[0], messages[1], writer, chosen.candidate.completion.key))
    return made


def _marks(candidates: list[Candidate], verify: Verify | None) -> list[float]:
    assert verify is not None, "pairs: judged has reward functions"
    return [mark if mark is not None else 0.0 for mark in verify(candidates)]
