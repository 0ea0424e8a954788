"""The rewards of a recipe, from their names and options to numbers for a batch of completions."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any

from finetune import reward_texts as texts
from finetune.limited import Limited
from finetune.reward_judge import endpoint_of, judge
from finetune.reward_math import Comparer
from finetune.reward_sample import Sample, Score, answer_of, lookup, wanted
from finetune.sandbox import run_tests
from finetune.sandbox_child import taken
from recipes.errors import DataError, EngineError, RecipeError, RetortError
from recipes.schema_rewards import Code, Function, JsonSchema, Regex, RewardTerm

__all__ = ["REWARDS", "Sample", "Score", "answer_of", "build", "check", "check_rows"]


def _each(score: Callable[[Sample, Any], float | None]) -> Callable[[Any, str | None], Score]:
    """A reward that looks at one sample at a time."""
    return lambda options, place: lambda samples: [score(sample, options) for sample in samples]


def _compared(score: Callable[[str, str, Any], float | None]) -> Callable[[Any, str | None], Score]:
    """A reward that compares the answer with the wanted one."""

    def build_it(options: Any, place: str | None) -> Score:
        def batch(samples: Sequence[Sample]) -> list[float | None]:
            golds = wanted(samples, options.column)
            pairs = zip(samples, golds, strict=True)
            return [None if gold is None else score(sample.answer, gold, options) for sample, gold in pairs]

        return batch

    return build_it


def _math(options: Any, place: str | None) -> Score:
    if importlib.util.find_spec("math_verify") is None:
        raise EngineError("the reward math needs math-verify", place, "pip install math-verify")
    comparer = Comparer()
    return lambda samples: comparer.equal([sample.answer for sample in samples], wanted(samples, options.column))


def _regex(options: Regex, place: str | None) -> Score:
    limited = Limited("regex", {"pattern": options.pattern, "whole": options.whole})

    def one(sample: Sample) -> float:
        text = texts.looked_at(sample.completion, options)
        return float(text is not None and limited.ask(text))

    return lambda samples: [one(sample) for sample in samples]


def _json_schema(options: JsonSchema, place: str | None) -> Score:
    limited = Limited("json_schema", texts.schema_of(options, place))
    return lambda samples: [float(limited.ask(texts.json_of(sample.answer))) for sample in samples]


def _citation(options: Any, place: str | None) -> Score:
    def batch(samples: Sequence[Sample]) -> list[float | None]:
        passages = zip(samples, lookup(samples, options.column), strict=True)
        return [None if text is None else texts.citation(s.answer, _joined(text), options) for s, text in passages]

    return batch


def _joined(passage: Any) -> str:
    return "\n".join(map(str, passage)) if isinstance(passage, (list, tuple)) else str(passage)


def _code(options: Code, place: str | None) -> Score:
    """As many answers at a time as this process has processors, its neighbours on the machine counted in."""
    if run_tests("def one(): return 1", ["assert one() == 1"], options.seconds, options.memory_mb) != 1.0:
        raise EngineError("the sandbox does not run a function that returns 1", place)
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def one(pair: tuple[Sample, Any]) -> float | None:
        sample, value = pair
        if value is None or not (tests := texts.tests_of(value, sample.row)):
            return None
        _require_entry(sample, tests, options)
        code = texts.code_of(sample.answer)
        try:
            return run_tests(code, tests, options.seconds, options.memory_mb) if code.strip() else 0.0
        except DataError as error:
            raise DataError(error.message, sample.row, "change the test, or leave the row out") from None

    def batch(samples: Sequence[Sample]) -> list[float | None]:
        with ThreadPoolExecutor(min(max(share, 1), 16)) as pool:
            return list(pool.map(one, zip(samples, lookup(samples, options.column), strict=True)))

    return batch


def _require_entry(sample: Sample, tests: Sequence[str], options: Code) -> None:
    """A name that tests use and leave open is the answer's to define. Were that a helper of theirs (`isclose`, `np`),
    the answer would write its own verdict: such a name must be known to be the answer's.

    Raises:
        DataError: it is not.
    """
    try:
        names = taken(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"the tests are no Python: {error}", sample.row) from None
    named = sample.columns.get(options.entry) if options.entry else None
    known = {named} if isinstance(named, str) else set(named or ())
    if not known and sample.reference is not None:
        known = texts.defined_in(texts.code_of(answer_of(sample.reference)))
    if not known and len(names) == 1:
        return
    if strange := sorted(names - known):
        raise DataError(
            f"its tests use {', '.join(strange)}, which an answer would define to its own advantage",
            sample.row,
            "define or import it in the tests; what answers shall define is named in a column (code: {entry: column})",
        )


def check_rows(term: RewardTerm, samples: Sequence[Sample]) -> None:
    """Find out what is wrong with rows before any is answered; samples without completions stand for them.

    Raises:
        DataError: a row that a reward cannot judge.
    """
    if term.name != "code":
        return
    for sample, value in zip(samples, lookup(samples, term.options.column), strict=True):
        if value is not None and (tests := texts.tests_of(value, sample.row)):
            _require_entry(sample, tests, term.options)


def _judge(options: Any, place: str | None) -> Score:
    endpoint = endpoint_of(options, place)
    return lambda samples: judge(samples, options, endpoint)


def _function(options: Function, place: str | None) -> Score:
    """The user's own function, called with one sample after the other."""
    function = _imported(options.path, place)

    def one(sample: Sample) -> float | None:
        try:
            value = function(sample)
        except Exception as error:
            raise RetortError(f"{options.path} failed: {type(error).__name__}: {error}", sample.row) from error
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise RetortError(f"{options.path} gave {value!r}, which is no finite number", sample.row)
        return None if value is None else float(value)

    return lambda samples: [one(sample) for sample in samples]


def _imported(path: str, place: str | None) -> Callable[[Sample], Any]:
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # last, so that nothing there hides an installed module; it may import more later
        sys.path.append(os.getcwd())
    here, before = str(Path(__file__).resolve().parent), list(sys.path)
    try:
        # `accelerate launch finetune/train.py` puts this folder first: a user's rewards.py would be taken for this one.
        sys.path[:] = [entry for entry in before if entry != here]
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise RecipeError(
            f"the module {module} cannot be imported: {cause}", place, f"looked also in {os.getcwd()}"
        ) from None
    finally:
        sys.path[:] = before
    if not callable(function):
        raise RecipeError(f"the module {module} has no function {name}", place)
    return function


# By the names in a recipe: from options, and their place in it, to the function that scores a batch.
REWARDS: dict[str, Callable[[Any, str | None], Score]] = {
    "exact": _compared(texts.exact),
    "math": _math,
    "label": _compared(texts.label),
    "regex": _regex,
    "think": _each(lambda sample, options: texts.think(sample.completion, options)),
    "json_schema": _json_schema,
    "citation": _citation,
    "length": _each(lambda sample, options: texts.length(sample.tokens, options)),
    "repetition": _each(lambda sample, options: texts.repetition(sample.completion, options)),
    "code": _code,
    "judge": _judge,
    "function": _function,
}


def build(term: RewardTerm, place: str | None = None) -> Score:
    """The function that scores a batch, without the term's weight.

    Raises:
        RecipeError: the options name a file, function or environment variable that is not there.
        EngineError: this machine lacks what the reward needs.
    """
    return REWARDS[term.name](term.options, place)


def check(terms: Sequence[RewardTerm]) -> None:
    """Find out what is wrong with the rewards of a recipe before anything is loaded. Raises as `build` does."""
    for index, term in enumerate(terms):
        build(term, f"method.rewards[{index}].{term.name}")
