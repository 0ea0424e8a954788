"""What every part of a recipe is built from: strict scalar types, and the section that refuses unknown keys."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    Strict,
    StringConstraints,
    model_serializer,
    model_validator,
)

from recipes.refs import parse_ref, path_of

# YAML already has types; a quoted "2" is a string and stays one.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), StringConstraints(min_length=1)]
Count = Annotated[Int, Field(ge=1)]
Fraction = Annotated[Float, Field(gt=0, lt=1)]


def _check_ref(text: str) -> str:
    parse_ref(text)
    return text


def _check_path(text: str) -> str:
    path_of(text)
    return text


ModelRefText = Annotated[Text, AfterValidator(_check_ref)]
PathText = Annotated[Text, AfterValidator(_check_path)]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class Named(Section):
    """One of several things, as its name, or as its name with options; the fields are the things that there are."""

    noun: ClassVar[str]
    needs: ClassVar[dict[str, str]] = {}  # name -> options without which it means nothing

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in cls.model_fields:
                close = difflib.get_close_matches(value, cls.model_fields, n=1)
                hint = f"did you mean {close[0]}?" if close else f"{cls.noun}s are {', '.join(cls.model_fields)}"
                raise ValueError(f"there is no {cls.noun} '{value}'; {hint}")
            if value in cls.needs:
                raise ValueError(f"the {cls.noun} {value} needs options: {{{value}: {{{cls.needs[value]}}}}}")
            return {value: {}}
        if isinstance(value, dict):
            return {name: {} if options is None else options for name, options in value.items()}
        return value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"a {self.noun} is one name: write - before each")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: options for name, options in handler(self).items() if options is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """A name alone is right too."""
        as_map = handler(core)
        return {"anyOf": [{"type": "string", "enum": list(cls.model_fields)}, as_map]}

    @property
    def name(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def options(self) -> Any:
        return getattr(self, self.name)
