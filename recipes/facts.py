"""Licence facts as data: `licenses/<id>.yaml`, one file per licence and version, and `licenses/families.yaml`.

A statement carries its clause, its source and how far it was verified; a licence states the source and the depth that
its statements share. Adding a licence touches one file. The texts are not kept, only what they say, in our own words.
"""

from __future__ import annotations

import json
import re
import unicodedata
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from recipes.errors import RetortError

FOLDER = Path(__file__).resolve().parent / "licenses"
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]

# full: the operative text was read. excerpt: the clause was read. reported: others say so. memory: nobody looked.
Verified = Literal["full", "excerpt", "reported", "memory"]
MAY_ALLOW = {"full", "excerpt"}  # the other two may deny and never allow

# What the licence says of training another model on the material's outputs (for data: on the data).
Rule = Literal["allowed", "conditions", "noncommercial", "competing", "forbidden", "silent"]
Grant = Literal["allowed", "conditional", "noncommercial", "forbidden"]
Duty = Literal[
    "name_prefix",
    "display",
    "notice_file",
    "licence_copy",
    "modified_notice",
    "use_restrictions",
    "acceptable_use",
    "register",
    "attribution",
    "keep_notices",
    "share_alike",
    "publication_statement",
    "terms",
]
When = Literal["always", "distribute", "make_available", "commercial"]
Measure = Literal["monthly_active_users", "annual_revenue_usd", "monthly_revenue_usd", "hosting_revenue_usd"]


class Fact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Statement(Fact):
    """What a licence says on one point. Source and depth are the licence's own where left out."""

    clause: Text | None = None
    says: Text
    source: Text | None = None
    verified: Verified | None = None


class OutputsRule(Statement):
    rule: Rule
    except_for: tuple[Text, ...] = ()  # ids: students whose base is under one of these are exempt from the ban
    derivative: bool = False  # a student trained on the outputs is a derivative: every duty reaches it


class Commercial(Statement):
    rule: Grant


class Limit(Statement):
    """A size from which the grant ends (or a duty begins)."""

    measure: Measure
    above: float
    effect: Literal["ends_grant", "needs_agreement", "adds_duty"]
    purpose: Literal["any", "commercial"] = "commercial"


class Agreement(Statement):
    """A use that needs the steward's agreement. It needs it where all that is named here is true of it."""

    purpose: Literal["any", "commercial"] = "commercial"
    distribution: bool = False  # the model or a derivative goes to others
    rivals: bool = False  # it competes with what the steward offers
    hosting: bool = False  # others are served from it; `use` does not say so of a model that is distributed


class Territory(Statement):
    deny: tuple[Text, ...]  # ISO codes, or EU
    scope: Literal["all", "multimodal"] = "all"


class Obligation(Statement):
    type: Duty
    value: Text | None = None
    when: When = "distribute"
    reach: Literal["material", "outputs", "both"] = "material"  # which students it binds
    only_if: Literal["cosmos", "multimodal"] | None = None


class Licence(Fact):
    id: Text
    name: Text
    version: Text | None = None
    spdx: Text | None = None
    steward: Text
    effective: Text | None = None
    kind: Literal["software", "weights", "data", "service"]
    aliases: tuple[Text, ...] = ()  # how cards and tags write it
    source: Text
    verified: Verified
    outputs: OutputsRule
    commercial: Commercial
    derivatives: Literal["allowed", "private"] = "allowed"  # private: adaptations may not be shared
    agreements: tuple[Agreement, ...] = ()
    limits: tuple[Limit, ...] = ()
    territories: tuple[Territory, ...] = ()
    obligations: tuple[Obligation, ...] = ()
    notes: Text | None = None

    def depth(self, statement: Statement) -> Verified:
        return statement.verified or self.verified

    def origin(self, statement: Statement) -> str:
        return statement.source or self.source


class Family(Fact):
    """Hub ids that match `id` are under all of `licences`. The first match decides."""

    id: Text
    licences: tuple[Text, ...] = ()  # none: known to be under terms that nobody has read
    verified: Verified
    source: Text
    flags: tuple[Literal["multimodal", "cosmos", "review"], ...] = ()
    generators: tuple[Text, ...] = ()  # licences of the models that wrote its training data
    history: tuple[Text, ...] = ()  # earlier licences of the same repository
    note: Text | None = None


class DataFamily(Fact):
    """A published data set whose label does not say all: the operative terms, with those of its generators."""

    id: Text
    names: tuple[Text, ...] = ()  # file and folder names it goes by, as lower-case patterns
    declared: Text
    licences: tuple[Text, ...]
    generators: tuple[Text, ...] = ()
    verified: Verified
    source: Text
    note: Text | None = None


class Host(Fact):
    """A service: the terms of the host, and whether the licence of the model behind it counts as well."""

    names: Annotated[tuple[Text, ...], Field(min_length=1)]  # prefixes, as in openai:gpt-4o
    hosts: tuple[Text, ...] = ()  # host names, as patterns
    licences: Annotated[tuple[Text, ...], Field(min_length=1)]
    models: tuple[Text, ...] = ()  # model names that belong to it wherever they are met, as lower-case patterns
    model_licence_too: bool = False
    verified: Verified
    source: Text


class Families(Fact):
    as_of: date
    models: tuple[Family, ...]
    datasets: tuple[DataFamily, ...]
    hosts: tuple[Host, ...]
    mirrors: tuple[Text, ...]  # organisations that upload other people's models unchanged or quantised
    regions: dict[Text, tuple[Text, ...]]  # EU: [AT, ...]

    @model_validator(mode="after")
    def _lower_case(self) -> Families:
        for names in (n for entry in (*self.datasets, *self.hosts) for n in getattr(entry, "names", ())):
            if names != names.lower():
                raise ValueError(f"'{names}' must be lower case")
        return self


class Facts:
    """All facts, read once: licences by id, families, and lookups."""

    def __init__(self, folder: Path) -> None:
        self.licences = {}
        for path in sorted(folder.glob("*.yaml")):
            if path.name == "families.yaml":
                continue
            licence = _read(path, Licence)
            if licence.id != path.stem:
                raise RetortError(f"its id is '{licence.id}'", str(path), "file and id are named alike")
            self.licences[licence.id] = licence
        self.families: Families = _read(folder / "families.yaml", Families)
        self.aliases: dict[str, str] = {}
        for licence in self.licences.values():
            for name in (licence.id, licence.spdx, licence.name, *licence.aliases):
                if name:
                    self.aliases.setdefault(fold(name), licence.id)
        entries: list[Any] = [*self.families.models, *self.families.datasets, *self.families.hosts]
        for entry in entries:
            for name in (*entry.licences, *getattr(entry, "generators", ())):
                if name not in self.licences:
                    raise RetortError(f"there is no licence '{name}'", str(folder / "families.yaml"))

    def named(self, text: str) -> str | None:
        """The id of a licence from how a card, a tag or a recipe writes it; None when nobody wrote its facts down."""
        return self.aliases.get(fold(text))

    def model(self, name: str) -> Family | None:
        """The family of a hub id `org/name`, compared without case."""
        wanted = name.casefold()
        return next((f for f in self.families.models if fnmatchcase(wanted, f.id.casefold())), None)

    def dataset(self, name: str) -> DataFamily | None:
        """The family of a hub data set id."""
        wanted = name.casefold()
        return next((f for f in self.families.datasets if fnmatchcase(wanted, f.id.casefold())), None)


@cache
def facts() -> Facts:
    return Facts(FOLDER)


def fold(text: str) -> str:
    """A name in the form in which names are compared: NFKC, lower case, words apart by single dashes."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\s_()\-/,:]+", "-", plain).strip("-. ")


def _read(path: Path, kind: Any) -> Any:
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return kind.model_validate(json.loads(json.dumps(yaml.load(path.read_text("utf-8"), loader), default=str)))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise RetortError(f"cannot be used ({error})", str(path), "repair the facts") from None
