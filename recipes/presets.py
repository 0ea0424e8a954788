"""How a teacher's answers are drawn: what the recipe says, and for the rest what the model's family asks for.

The families stand in presets.yaml, each with its source and how far that was read. A name is all that is looked at: of
`org/name@revision`, a folder or `host:model` the last part. A folder that is called something else gets no preset.
"""

from __future__ import annotations

import difflib
import re
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from recipes.errors import RecipeError, RetortError
from recipes.schema import Recipe
from recipes.schema_teacher import Sampling, Teacher

PATH = Path(__file__).resolve().parent / "presets.yaml"
PLACE = "teacher.sampling.preset"
DRAWS = ("temperature", "top_p", "top_k", "min_p")  # what a draw is made with; without a draw they mean nothing
PENALTIES = ("repetition_penalty", "presence_penalty")
FIELDS = (*DRAWS, *PENALTIES)
OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # values that cut nothing off
UNTUNED = re.compile(r"[-_.](?:base|pt)(?=$|[-_.])")  # base models: no family's advice on its chat models is for them

Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Verified = Literal["card", "generation_config", "docs", "paper", "quoted", "memory"]
READ: dict[Verified, str] = {
    "card": "model card",
    "generation_config": "generation_config.json",
    "docs": "documentation",
    "paper": "paper",
    "quoted": "as others quote the vendor",
    "memory": "from memory, not checked",
}


class Preset(BaseModel):
    """What one family asks for; fields that are None were not spoken of.

    Attributes:
        models: patterns (fnmatch, lower case) of names without the organisation.
        thinking: the mode that it is for, where a family has two; None: whatever the mode.
        source: where it is said. `verified`: what of that was read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text
    models: Annotated[tuple[Text, ...], Field(min_length=1)]
    thinking: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)]
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    source: Text
    verified: Verified

    @property
    def says(self) -> str:
        return f"preset {self.id} ({READ[self.verified]})"

    def fits(self, name: str, thinking: bool | None) -> bool:
        """Whether it is for a model of this name (lower case, no organisation) in this mode; None: the default one."""
        mode = self.thinking is None or thinking is None or self.thinking == thinking
        return mode and any(fnmatchcase(name, pattern) for pattern in self.models)


class Presets(BaseModel):
    """The whole of presets.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    as_of: date
    presets: Annotated[tuple[Preset, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        ids = [preset.id for preset in self.presets]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"the preset {twice[0]} is there twice")
        if taken := {"auto", "none"} & set(ids):
            raise ValueError(f"no preset can be named {min(taken)}: the recipe's field has a meaning for it")
        if loud := [pattern for preset in self.presets for pattern in preset.models if pattern != pattern.lower()]:
            raise ValueError(f"the pattern '{loud[0]}' must be lower case")
        return self


def read_presets(path: Path) -> Presets:
    """The presets of a file.

    Raises:
        RetortError: it cannot be read, or an entry is wrong or lacks its source.
    """
    try:
        return Presets.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise RetortError(f"cannot be used ({error})", str(path), "repair the presets") from None


@cache
def presets() -> tuple[Preset, ...]:
    """The shipped presets, read once."""
    return read_presets(PATH).presets


def resolve(recipe: Recipe) -> tuple[dict[str, float], str]:
    """How the teacher's answers are drawn, and one sentence on where that comes from.

    Args:
        recipe: one with a teacher.

    Returns:
        `temperature` always (0: greedy); of top_p, top_k, min_p, repetition_penalty, presence_penalty what is set by
        the recipe or, failing that, by the preset. What cannot act on a greedy choice is left out.

    Raises:
        RecipeError: there is no preset of that name, or several samples of a prompt would all be the same.
    """
    teacher = recipe.teacher
    if teacher is None:
        raise RecipeError("there is no teacher whose sampling could be told", "teacher", "name one")
    preset, absence = _chosen(teacher)
    own = _values(teacher.sampling)
    values = {**(_values(preset) if preset is not None else {}), **own}
    several = _most_samples(teacher) > 1
    invented = "temperature" not in values
    if invented:
        draws = several or any(name in values and values[name] != off for name, off in OFF.items())
        values["temperature"] = 1.0 if draws else 0.0
    if values["temperature"] == 0:
        if several:
            raise _all_equal(teacher, preset, "temperature" in own)
        values = {name: value for name, value in values.items() if name == "temperature" or name in PENALTIES}
    kept = {name: values[name] for name in FIELDS if name in values}
    return kept, _sentence(preset, absence, kept, [name for name in FIELDS if name in own], invented)


def preset_of(model: str, template_kwargs: dict[str, bool | int | str] | None = None) -> Preset | None:
    """The preset of a model by its name alone, None where no family has it.

    Args:
        model: as a recipe names it: `org/name@revision`, a folder, `embedded:NAME`, `host:model`.
        template_kwargs: variables for its chat template; `enable_thinking` chooses between two modes.
    """
    names = _names(model)
    asked = (template_kwargs or {}).get("enable_thinking")
    thinking = bool(asked) if isinstance(asked, bool | int) else None
    return next((preset for preset in presets() if any(preset.fits(name, thinking) for name in names)), None)


def _chosen(teacher: Teacher) -> tuple[Preset | None, str]:
    """The preset that the recipe asks for; where there is none, why."""
    wanted = teacher.sampling.preset
    if wanted == "none":
        return None, "no preset is asked for"
    if wanted == "auto":
        return preset_of(teacher.model, teacher.template_kwargs), f"no preset for {teacher.model}"
    known = {preset.id: preset for preset in presets()}
    if wanted not in known:
        close = difflib.get_close_matches(wanted.casefold(), known, n=1)
        remedy = f"did you mean {close[0]}?" if close else "write auto, none, or a name of recipes/presets.yaml"
        raise RecipeError(f"there is no preset '{wanted}'", PLACE, remedy)
    return known[wanted], ""


def _names(model: str) -> tuple[str, ...]:
    """What the patterns are compared with: the name without organisation, host, folder and revision, in lower case; and
    without what some mirrors put before it (`Qwen_Qwen3-8B-GGUF`)."""
    name = model.strip().casefold().rstrip("/").rpartition("/")[2].partition("@")[0].rpartition(":")[2]
    if UNTUNED.search(name):
        return ()
    return tuple(dict.fromkeys((name, name.partition("_")[2] or name)))


def _values(section: Sampling | Preset) -> dict[str, float]:
    """The fields that are set. top_k stays a whole number, the others do not become one: equal settings, equal keys."""
    found = {name: getattr(section, name) for name in FIELDS}
    return {name: value if name == "top_k" else float(value) for name, value in found.items() if value is not None}


def _most_samples(teacher: Teacher) -> int:
    """Answers to one question at most, over all rounds."""
    return max(r.samples or (teacher.samples if r.write == "answer" else 1) for r in teacher.rounds)


def _all_equal(teacher: Teacher, preset: Preset | None, own: bool) -> RecipeError:
    """A greedy teacher gives the same answer as often as it is asked."""
    why = "temperature 0" if own else f"temperature 0 of {preset.says}" if preset is not None else "greedy"
    place = "teacher.sampling.temperature" if own else PLACE
    remedy = "set teacher.sampling.temperature above 0, or samples to 1"
    return RecipeError(f"{_most_samples(teacher)} samples of a prompt are all the same at {why}", place, remedy)


def _sentence(preset: Preset | None, absence: str, kept: dict[str, float], own: list[str], invented: bool) -> str:
    greedy = kept["temperature"] == 0
    told = [name for name in own if name in kept]
    if preset is not None:
        return preset.says + (f"; {', '.join(told)} from the recipe" if told else "")
    if not told:
        return f"greedy: {absence}" if greedy else f"temperature 1: {absence}, and several samples must differ"
    whence = f"{', '.join(told)} from the recipe; {absence}"
    if not invented:
        return whence
    return f"greedy; {whence}" if greedy else f"{whence}, so the temperature is 1"
