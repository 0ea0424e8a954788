"""The names that `retort plan` checks are those that the installed classes take."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from finetune.arguments import CONFIGS
from finetune.config_fields import fields_of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", sorted({*CONFIGS.values(), "trl.experimental.gold:GOLDConfig"}))
def test_fields_of_a_source_are_those_of_the_class(place: str) -> None:
    module, _, name = place.partition(":")
    kind = getattr(importlib.import_module(module), name)
    assert fields_of(name) == {field.name for field in dataclasses.fields(kind) if field.init}


def test_a_class_that_is_not_there_is_not_guessed_at() -> None:
    assert fields_of("NoSuchConfig") is None
