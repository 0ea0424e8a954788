"""What a reward function is given, and what it may ask of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.completions import split_thinking
from recipes.errors import DataError


@dataclass(frozen=True)
class Sample:
    """A completion of the model, and the row that it belongs to.

    Attributes:
        prompt: text of the last user turn; `messages`: the whole prompt.
        completion: decoded, without special tokens, thinking kept.
        reference: the wanted answer, None where the row has none.
        columns: the row's other columns.
        tokens: length of the completion; `finished`: it ended by itself and was not cut.
    """

    prompt: str
    messages: tuple[dict[str, Any], ...]
    completion: str
    reference: str | None
    columns: Mapping[str, Any]
    tokens: int
    finished: bool

    @property
    def answer(self) -> str:
        return answer_of(self.completion)

    @property
    def row(self) -> str:
        """The row's id, or the beginning of its prompt, for a message."""
        known = self.columns.get("_id") or self.columns.get("id")
        return f"row {known}" if known else f"row with the prompt '{self.prompt[:60]}'"


# None says that the reward does not apply to that sample. A batch at a time, so that slow ones may work in parallel.
Score = Callable[[Sequence[Sample]], list[float | None]]


def answer_of(completion: str) -> str:
    """What follows the thinking; nothing where the thinking does not end."""
    return split_thinking(completion)[1]


def lookup(samples: Sequence[Sample], column: str) -> list[Any]:
    """The column's value of every sample, None where it is empty.

    Raises:
        DataError: none of the samples has such a column.
    """
    if samples and not any(column in sample.columns for sample in samples):
        have = ", ".join(sorted(samples[0].columns)) or "none"
        raise DataError(f"the column '{column}' that a reward needs is missing", samples[0].row, f"columns are: {have}")
    values = [sample.columns.get(column) for sample in samples]
    return [None if value is None or value in ("", [], ()) else value for value in values]


def wanted(samples: Sequence[Sample], column: str | None) -> list[str | None]:
    """The wanted answers, without thinking: those of a column, or else the references."""
    values = [sample.reference for sample in samples] if column is None else lookup(samples, column)
    return [None if value is None else answer_of(str(value)) or None for value in values]
