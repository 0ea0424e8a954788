"""What every part of a recipe is built from: strict scalar types, and the section that refuses unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, StringConstraints

from recipes.refs import parse_ref

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


ModelRefText = Annotated[Text, AfterValidator(_check_ref)]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)
