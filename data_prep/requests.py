"""Passages -> requests for a teacher: questions on a passage, grounded answers, critiques, summaries. No model runs.

A request is a prompt row; the passage travels beside it, so that the teacher's answer can be checked against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.rows import Row
from recipes.errors import DataError
from recipes.schema_data import RequestTask

SYSTEM = "You work from the passage alone. What it does not say you do not know."
INSTRUCTIONS = {
    "questions": (
        "Write {count} questions that a reader could answer from the passage below, and from nothing else. Ask for "
        "different things, in different words, each in one sentence that makes sense without the passage at hand. "
        "Write one question per line, without numbers.\n\nPassage:\n{passage}"
    ),
    "answers": (
        "Answer the question from the passage below. Quote the words that your answer rests on. If the passage does "
        "not answer it, say so.\n\nPassage:\n{passage}\n\nQuestion: {question}"
    ),
    "critiques": (
        "Judge the answer to the question by the passage below: is every statement in it supported, is anything that "
        "matters missing? Name each fault in one line, then give a mark from 1 (wrong) to 5 (right and complete) on a "
        "line of its own.\n\nPassage:\n{passage}\n\nQuestion: {question}\n\nAnswer: {answer}"
    ),
    "summaries": "Summarise the passage below in at most three sentences.\n\nPassage:\n{passage}",
}
_PLACE = re.compile(r"\{(\w+)\}")


def requests_of(row: Row, tasks: Sequence[RequestTask]) -> Iterator[Row]:
    """The requests that a passage gives rise to, one per task, in order.

    Args:
        row: a text row; `question` and `answer` are read from its other columns where a task needs them.

    Raises:
        DataError: a task needs a column that the row lacks.
    """
    assert row.text is not None, "requests are made of passages"
    for task in tasks:
        wording = task.instruction or INSTRUCTIONS[task.task]
        values = {**row.extra, "passage": row.text, "count": task.count}
        prompt = fill(wording, values, row.source, f"the task {task.task}")
        extra = {**row.extra, "task": task.task, "passage": row.text, "passage_id": row.id}
        messages = ({"role": "system", "content": task.system or SYSTEM}, {"role": "user", "content": prompt})
        yield Row(row.source, messages, extra=extra, grouped=row.group)


def fill(wording: str, values: Mapping[str, Any], place: str, reader: str) -> str:
    """A wording with its {places} filled, all in one pass. Only names are looked up; nothing is evaluated.

    Args:
        reader: what reads the columns, for the message.

    Raises:
        DataError: a value is missing or empty.
    """
    if missing := sorted({name for name in _PLACE.findall(wording) if values.get(name) in (None, "")}):
        raise DataError(f"has no column '{missing[0]}'", place, f"{reader} reads it: give the source such a column")
    return _PLACE.sub(lambda found: str(values[found[1]]), wording)
