"""The one error tree of Retort. Every error a user can cause ends as one line and an exit code.

RetortError (1)
├── RecipeError (2, ValueError)         the recipe says something impossible
├── GateError (3, PermissionError)      a licence in the lineage forbids the plan, or nobody knows
├── DataError (4, ValueError)           rows that cannot be read, masked or trusted
├── MemoryFitError (5, MemoryError)     the plan does not fit the device
└── EngineError (6, RuntimeError)       a teacher or an inference engine failed
"""

LONGEST, SHOWN = 500, 80  # characters of a word in an error: paths are whole, a value of 5,000 letters is not


def out_of_memory(error: BaseException) -> bool:
    """Whether a library says that memory ran out: torch's error on a GPU, a plain RuntimeError on a processor."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


class RetortError(Exception):
    """Base of all errors that Retort raises on purpose.

    Args:
        message: what is wrong, in one sentence without a full stop.
        place: where it is wrong (`file:line:column`, a row id, a key path).
        remedy: what makes it right.
    """

    exit_code = 1

    def __init__(self, message: str, place: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message, self.place, self.remedy = message, place, remedy

    def __str__(self) -> str:
        text = f"{self.place}: {self.message}" if self.place else self.message
        text = f"{text}; {self.remedy}" if self.remedy else text
        return " ".join(word if len(word) <= LONGEST else f"{word[:SHOWN]}..." for word in text.split())

    def __reduce__(self) -> tuple[type, tuple[str, str | None, str | None]]:
        return type(self), (self.message, self.place, self.remedy)


class RecipeError(RetortError, ValueError):
    exit_code = 2


class GateError(RetortError, PermissionError):
    exit_code = 3


class DataError(RetortError, ValueError):
    exit_code = 4


class MemoryFitError(RetortError, MemoryError):
    exit_code = 5


class EngineError(RetortError, RuntimeError):
    exit_code = 6
