"""No teacher at all: the answers that another run's journal holds. For trying filters and methods on answers that were
paid for once, and for machines that the teacher does not fit on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.earlier_teacher import IDENTITY
from data_prep.logit_cache import Sparse
from distill.journal import JOURNAL
from distill.journal_files import Records
from distill.teachers import Completion, Request
from recipes.errors import EngineError
from recipes.refs import path_of
from recipes.schema import Recipe
from recipes.student import TEACHER


class ReplayTeacher:
    """Answers from a journal. A truncated answer is given as it is, under the limit that it was written with.

    Attributes:
        identity: of the teacher that was recorded, so that requests have the keys that they had then.

    Raises:
        EngineError: the run has no journal, or does not say whose answers they are.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.teacher is not None
        run = path_of(recipe.teacher.engine.options.run)
        self._folder = run / TEACHER / JOURNAL
        self.identity = _identity(run / TEACHER / IDENTITY)
        if not self._folder.is_dir():
            raise EngineError("has no journal of a teacher", str(run), "teacher.engine.replay.run must name another")
        self._records: Records | None = None  # read when it is asked: many want to know the identity alone

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """The recorded answers, in the order of the requests.

        Raises:
            EngineError: some are not on record. Nothing is yielded then.
            DataError: the journal cannot be read, or another version of Retort wrote it.
        """
        records = self._records = Records(self._folder) if self._records is None else self._records
        wanted = [request.key for request in requests]
        if missing := sum(key not in records for key in wanted):
            damaged = sum(records.damaged.values())
            raise EngineError(
                f"{missing} of {len(wanted)} answers are not in this journal of {len(records)}"
                + (f" ({damaged} of its lines are damaged)" if damaged else ""),
                str(self._folder),
                "it was made with other prompts, sampling, seed or samples, or it is unfinished: replay it with the "
                "recipe that made it, or ask the teacher itself",
            )
        for key in wanted:
            found = records.get(key)
            assert found is not None
            yield found

    def score(self, sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Iterator[Sparse]:
        raise EngineError(
            "a journal holds no distributions",
            "teacher.engine.replay",
            "score with the engine transformers, which can walk along recorded answers",
        )

    def close(self) -> None:
        if self._records is not None:
            self._records.close()
            self._records = None


def _identity(path: Path) -> dict[str, Any]:
    remedy = "teacher.engine.replay.run must name a run directory in which retort generate has answers"
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError("is not there, so nobody knows whose answers they are", str(path), remedy) from None
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot be read ({error})", str(path), remedy) from None
    if not isinstance(identity, dict):
        raise EngineError("is no JSON object", str(path), remedy)
    return identity
