"""The data section of a recipe: sources, how rows are held out, and the preparation steps with their options."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from recipes.benchmarks import BENCHMARKS
from recipes.refs import Ref, parse_ref, path_of
from recipes.sections import Bool, Count, Float, Fraction, Int, ModelRefText, Named, PathText, Section, Text

# fmt: off
QualityRule = Literal[
    "min_words", "max_words", "min_mean_word_length", "max_mean_word_length", "max_symbol_ratio", "max_bullet_lines",
    "max_ellipsis_lines", "min_alphabetic_words", "min_stop_words", "max_duplicate_lines", "max_duplicate_line_chars",
    "max_duplicate_paragraphs", "max_duplicate_paragraph_chars", "max_top_2gram", "max_top_3gram", "max_top_4gram",
    "max_duplicate_5gram", "max_duplicate_6gram", "max_duplicate_7gram", "max_duplicate_8gram", "max_duplicate_9gram",
    "max_duplicate_10gram",
]
Entity = Literal[
    "IBAN", "CREDIT_CARD", "CRYPTO", "US_SSN", "IP_ADDRESS", "EMAIL", "URL", "PHONE", "US_DRIVER_LICENSE", "PASSPORT",
    "TAX_ID", "DATE_OF_BIRTH", "STREET_ADDRESS", "ZIP_CODE", "PERSON", "LOCATION", "ORGANIZATION",
]
# fmt: on
Column = Literal[
    "system", "prompt", "completion", "text", "messages", "reasoning", "chosen", "rejected", "label", "tools"
]


class Passages(Section):
    """How documents are cut into passages."""

    characters: Count = Field(2000, description="longest passage; paragraphs are joined up to it")
    overlap: Annotated[Int, Field(ge=0)] = Field(
        0, description="characters of a passage repeated at the start of the next"
    )

    @model_validator(mode="after")
    def _smaller(self) -> Self:
        if self.overlap * 2 > self.characters:
            raise ValueError("overlap is more than half a passage")
        return self


class Source(Section):
    """One source of rows: exactly one of `path`, `hub`, `embedded`."""

    path: PathText | None = Field(
        None, description="a .jsonl, .json, .csv or .parquet file, a document, a folder of them, or a saved dataset"
    )
    hub: Text | None = Field(None, description="org/name@revision of a dataset on the hub")
    embedded: Text | None = Field(None, description="a data set shipped with Retort")
    split: Text | None = Field(None, description="hub, embedded and saved datasets: which split")
    subset: Text | None = Field(None, description="hub: which configuration of the dataset")
    license: Text | None = Field(None, description="SPDX id under which the rows may be used")
    generated_by: Text | None = Field(None, description="the model that wrote the rows, where no column says so")
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "labelled", "prompt", "text"
    ] = Field("auto", description="the shape of the rows; auto recognises it from the columns")
    columns: dict[Column, Text] | None = Field(
        None,
        description="where the parts of a row are: a column, a dotted path (row.text), or a text with {column} places",
    )
    group: Text | None = Field(
        None, description="column whose value keeps rows on one side of a split (default: a column `group`)"
    )
    passages: Passages | None = Field(None, description="documents only: how they are cut; read documents in a folder")
    weight: Annotated[Float, Field(gt=0)] | None = Field(
        None, description="share in the mixture; the source that is scarcest for its weight is kept whole"
    )
    limit: Count | None = Field(None, description="take only the first rows")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [n for n in ("path", "hub", "embedded") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"a source needs exactly one of path, hub, embedded; it has {given or 'none'}")
        if self.hub is not None and parse_ref(self.hub).kind != "hub":
            raise ValueError(f"'{self.hub}' is no hub reference; write org/name@revision, or use path")
        if self.embedded is not None:
            parse_ref(f"embedded:{self.embedded}")
        if self.subset is not None and self.hub is None:
            raise ValueError("subset has a meaning for hub datasets alone")
        if self.passages is not None and self.path is None:
            raise ValueError("passages are cut from documents: give a path")
        if self.path is not None and self.split is not None and path_of(self.path).is_file():
            raise ValueError("split has no meaning for a file; name the file of the split")
        if self.columns is not None and "text" in self.columns and len(self.columns) > 1:
            raise ValueError("columns name either text or the parts of a chat, not both")
        if self.columns is not None and self.format in {"sharegpt", "alpaca"}:
            raise ValueError(f"columns have no meaning for format {self.format}; leave one of the two out")
        return self

    @property
    def ref(self) -> Ref:
        if self.path is not None:
            return Ref("local", self.path)
        return parse_ref(self.hub) if self.hub is not None else Ref("embedded", str(self.embedded))

    def __str__(self) -> str:
        parts = [str(self.ref), *(part for part in (self.subset, self.split) if part)]
        return ":".join(parts)


class Clean(Section):
    """Repair broken encodings, drop control characters, bring Unicode and line ends into one form."""

    html: Bool = Field(False, description="also take out HTML that leaked into texts")


class Language(Section):
    """Keep rows in some languages."""

    keep: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(description="ISO 639-1 codes: [en, de]")
    min_probability: Fraction = Field(0.5, description="of the language that a text most likely is in")


class Length(Section):
    """Keep rows of some lengths; counted in tokens of the base, without the chat template."""

    min_tokens: Count | None = None
    max_tokens: Count | None = None

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_tokens is None and self.max_tokens is None:
            raise ValueError("give min_tokens, max_tokens or both")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self


class Quality(Section):
    """Drop texts that look like no prose: heuristics after Rae et al. 2021 (arXiv 2112.11446, A.1.1).

    Answers of fewer than 20 words are too short for them and stay.
    """

    on: Literal["completion", "row"] = Field("completion", description="what is looked at; of a text row all")
    rules: dict[QualityRule, Float | None] = Field(
        default_factory=dict, description="thresholds that replace the defaults; null switches a rule off"
    )


class Pii(Section):
    """Find personal data, and mask it or drop the row."""

    action: Literal["mask", "drop"] = Field("mask", description="mask: [EMAIL_1]; the same value, the same number")
    entities: tuple[Entity, ...] | None = Field(
        None, description="what to look for; default the structured identifiers"
    )
    regions: tuple[Text, ...] = Field(("US", "GB", "DE"), description="whose phone numbers may lack a country code")
    names: ModelRefText | None = Field(None, description="a token-classification model that finds names")


class ExactDedup(Section):
    """Keep the first of equal rows."""

    on: Literal["row", "prompt", "completion"] = Field("row", description="what must be equal")


class NearDedup(Section):
    """Keep the first of near-equal rows (MinHash over word n-grams)."""

    threshold: Annotated[Float, Field(ge=0.3, le=1)] = Field(
        0.85, description="Jaccard similarity that counts as equal"
    )
    on: Literal["row", "prompt", "completion"] = Field("row", description="what is compared")
    words: Annotated[Int, Field(ge=1, le=20)] = Field(3, description="words of an n-gram")


class SemanticDedup(Section):
    """Keep the first of rows that mean the same: cosine similarity of embeddings."""

    model: ModelRefText = Field(description="an encoder; its last hidden states are averaged")
    threshold: Fraction = Field(0.95, description="cosine similarity that counts as equal")
    on: Literal["row", "prompt", "completion"] = Field("row", description="what is compared")


class Decontaminate(Section):
    """Drop training rows that overlap with the held-out rows or with a benchmark. The last step."""

    against: Annotated[tuple[Text | Source, ...], Field(min_length=1)] = Field(
        ("eval",), description="eval (the held-out rows), names of benchmarks on the hub (gsm8k, mmlu, ...), or sources"
    )
    words: Annotated[Int, Field(ge=5, le=50)] = Field(13, description="words in a row that make an overlap")
    similarity: Fraction | None = Field(
        0.4, description="similarity (Jaccard, of word runs) of texts that count as the same; null: n-grams alone"
    )

    @field_validator("against")
    @classmethod
    def _known(cls, value: tuple[str | Source, ...]) -> tuple[str | Source, ...]:
        names = ("eval", *BENCHMARKS)
        if wrong := [name for name in value if isinstance(name, str) and name not in names]:
            close = difflib.get_close_matches(wrong[0], names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"names are {', '.join(names)}; or give a source"
            raise ValueError(f"no benchmark is named '{wrong[0]}'; {hint}")
        return value

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is compared beside the held-out rows."""
        named = [BENCHMARKS[name] if isinstance(name, str) else name for name in self.against if name != "eval"]
        return tuple(source if isinstance(source, Source) else _benchmark(source) for source in named)


def _benchmark(entry: dict[str, str]) -> Source:
    place = {key: value for key, value in entry.items() if key != "text"}
    return Source.model_validate({**place, "columns": {"text": entry["text"]}})


class Step(Named):
    """One preparation step: its name, or its name with options."""

    clean: Clean | None = None
    language: Language | None = None
    length: Length | None = None
    quality: Quality | None = None
    pii: Pii | None = None
    exact_dedup: ExactDedup | None = None
    near_dedup: NearDedup | None = None
    semantic_dedup: SemanticDedup | None = None
    decontaminate: Decontaminate | None = None

    noun: ClassVar[str] = "step"
    needs: ClassVar[dict[str, str]] = {
        "language": "keep: [en]",
        "length": "max_tokens: 2000",
        "semantic_dedup": "model: org/name@revision",
    }


class Holdout(Section):
    """Rows held out of the training sources, by whole groups: rows of one document or group, rows with the same prompt
    and near-duplicates never straddle the split."""

    fraction: Fraction = Field(description="share of the rows")
    near: Annotated[Float, Field(ge=0.3, le=1)] | None = Field(
        0.8, description="prompts (or texts) from this Jaccard similarity stay on one side; null: equal ones alone"
    )


class RequestTask(Section):
    """What a teacher is asked of every passage."""

    task: Literal["questions", "answers", "critiques", "summaries"] = Field(
        description="answers read the passage's column question, critiques also its answer"
    )
    count: Annotated[Int, Field(ge=1, le=50)] = Field(3, description="questions per passage")
    instruction: Text | None = Field(None, description="own wording, with {passage}, {count} and {column} places")
    system: Text | None = Field(None, description="own system message")

    @model_validator(mode="after")
    def _shows_the_passage(self) -> Self:
        if self.instruction is not None and "{passage}" not in self.instruction:
            raise ValueError("the instruction has no place {passage}, so the teacher would not see it")
        return self


class Data(Section):
    """Which rows, and what of them is trained."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)] = Field(description="training sources, in order")
    eval: Holdout | Annotated[tuple[Source, ...], Field(min_length=1)] | None = Field(
        None, description="held-out sources, or {fraction: f} of the training rows; null: nothing is measured"
    )
    steps: tuple[Step, ...] = Field((), description="preparation steps, in order")
    requests: tuple[RequestTask, ...] = Field(
        (), description="make requests for the teacher of plain texts (documents), instead of training on them"
    )
    train_on: Literal["all", "last"] = Field("all", description="every assistant turn, or only the last one of a row")
    too_long: Literal["stop", "drop", "truncate", "split"] = Field(
        "drop",
        description="rows over train.seq_len: stop, drop the row (counted), cut its end, or (plain text) split it",
    )
    on_bad_row: Literal["stop", "drop"] = Field(
        "stop", description="a row that cannot be read: stop, or drop it (counted, and kept in dropped.jsonl)"
    )

    @field_validator("eval", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        if isinstance(value, dict) and {"path", "hub", "embedded"} & value.keys():
            raise ValueError("held-out sources are a list: write - before the source")
        if value == [] or value == ():
            raise ValueError("an empty list holds nothing out; write null, or {fraction: 0.05}")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        names = [step.name for step in self.steps]
        if "decontaminate" in names[:-1]:
            raise ValueError("decontaminate is the last step: it looks at the rows that are left")
        if "decontaminate" in names and "eval" in self.steps[-1].options.against and self.eval is None:
            raise ValueError("decontaminate against eval needs data.eval: there are no held-out rows")
        if len({source.weight is None for source in self.train}) > 1:
            raise ValueError("either every training source has a weight, or none")
        return self

    @property
    def benchmarks(self) -> tuple[Source, ...]:
        """Sources that training rows must not overlap with, beside the held-out rows."""
        steps = [step.options for step in self.steps if step.name == "decontaminate"]
        return tuple(source for options in steps for source in options.sources)
