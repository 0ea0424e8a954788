"""Whether a teacher fits a student: asked before anything large is loaded, and answered token by token.

Where the student learns from the teacher's distributions (modes logits and on_policy), token 17 must be the same token
on both sides, a prompt must be the same tokens for both, and the token that ends the teacher's answer must end the
student's. None of this shows in a vocabulary's size, and a wrong pair trains without an error, on nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.earlier_teacher import changed_teacher
from data_prep.masks import mask_prompt
from data_prep.model_files import tensors_of
from data_prep.tokens import Tokenizer, fetch, load_tokenizer
from recipes.errors import DataError, RecipeError
from recipes.lineage import read_object
from recipes.refs import parse_ref
from recipes.schema import Model, Recipe

Message = dict[str, Any]
STRICT = {"logits", "on_policy"}  # modes that compare distributions over tokens
CHATS = 200  # prompts that are rendered by both sides; templates differ in all of them or in kinds of them
_BYTES = {"float32": 4, "float": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


def require_pair(
    recipe: Recipe,
    student: Tokenizer,
    teacher: Tokenizer | None,
    chats: Sequence[Sequence[Message]],
    tools: Sequence[list[Any] | None] | None = None,
) -> list[str]:
    """Refuse a teacher whose distributions the student could not learn from. Returns what is only doubtful.

    The modes sequence and preference pass text on, and cross_tokenizer aligns it: there any pair is possible.

    Args:
        teacher: None where it is not to be had (see `load_teacher_tokenizer`).
        chats: prompts of the recipe's rows, without the answer; up to 200 of them, spread evenly, are compared.
        tools: tool definitions offered with each prompt.

    Raises:
        RecipeError: different tokens, different prompts, or a stop token that the student takes for text.
    """
    method = recipe.method
    assert method.type == "distill" and recipe.teacher is not None
    doubts = [doubt for doubt in (_sizes(recipe), changed_teacher(recipe)) if doubt]
    if method.mode not in STRICT:
        return doubts
    if teacher is None:
        raise RecipeError(f"mode {method.mode} needs the teacher's tokenizer", "teacher.tokenizer", "say where it is")
    different = same_tokens(student.backend, teacher.backend)
    if method.mode == "on_policy" and method.cross_tokenizer:
        if different is None:
            doubts.append("cross_tokenizer is set, and both have the same tokens: without it the loss is exact")
        return doubts
    if different is not None:
        remedy = "choose a teacher of the student's family"
        if method.mode == "on_policy":
            remedy += ", or set method.cross_tokenizer: true (experimental)"
        if _lacks_only(student.backend, teacher.backend):
            remedy = f"set model.tokenizer: {recipe.teacher.tokenizer or recipe.teacher.model}, which has them all"
        raise RecipeError(f"student and teacher have different tokens: {different}", "teacher.model", remedy)
    _require_same_chat(recipe, student.backend, teacher.backend, chats, tools)
    return doubts


def _require_same_chat(
    recipe: Recipe,
    student: Any,
    teacher: Any,
    chats: Sequence[Sequence[Message]],
    tools: Sequence[list[Any] | None] | None,
) -> None:
    """Refuse a pair that reads prompts differently, or whose student does not stop where the teacher does."""
    assert recipe.teacher is not None
    asked = range(0, len(chats), max(1, -(-len(chats) // CHATS)))
    found = same_prompt(
        student,
        teacher,
        [chats[i] for i in asked],
        recipe.model.template_kwargs,
        recipe.teacher.template_kwargs,
        [tools[i] for i in asked] if tools is not None else None,
    )
    if found is not None:
        remedy = (
            "give both the same template (model.chat_template: a .jinja file with the teacher's) and template_kwargs"
        )
        raise RecipeError(f"student and teacher read prompts differently: {found}", "teacher.model", remedy)
    stops = end_tokens(student, _folder(recipe.model.base, "model.base"))
    ends = end_tokens(teacher, _folder(recipe.teacher.model, "teacher.model"))
    found = same_end(student, teacher, stops, ends, recipe.teacher.template_kwargs)
    if found is not None:
        remedy = "start from the student's chat version, or set model.tokenizer to one whose end token it is"
        raise RecipeError(found, "teacher.model", remedy)


def load_teacher_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The teacher's tokenizer; None for a teacher known by name only, where the mode passes text on.

    Raises:
        RecipeError: it cannot be loaded, and the mode or the recipe asks for it.
    """
    teacher = recipe.teacher
    assert teacher is not None
    place = "teacher.tokenizer" if teacher.tokenizer else "teacher.model"
    try:
        text = teacher.tokenizer or teacher.model
        return load_tokenizer(Model(base=text, tokenizer=text))
    except ValueError as error:  # a RecipeError is one too; pydantic's says that the name is no reference: a service
        wanted = recipe.method.key in STRICT or teacher.tokenizer is not None
        if not wanted and teacher.engine.name in {"http", "replay"}:
            return None
        if isinstance(error, RecipeError):
            raise RecipeError(error.message, place, error.remedy) from None
        raise RecipeError(
            f"'{text}' is no model whose tokenizer could be loaded", "teacher.tokenizer", "say where it is"
        ) from None


def same_tokens(student: Any, teacher: Any) -> str | None:
    """None where every id is the same token for both transformers tokenizers; else where they part.

    Embedding rows beyond the vocabulary (Qwen has hundreds) are no tokens, and may differ in number.
    """
    here, there = ({i: token for token, i in backend.get_vocab().items()} for backend in (student, teacher))
    differ = sorted(i for i in here.keys() | there.keys() if here.get(i) != there.get(i))
    if not differ:
        return None
    shown = "; ".join(f"id {i} is {_token(here, i)} here and {_token(there, i)} there" for i in differ[:3])
    return f"{shown}; {len(differ):,} of {len(here.keys() | there.keys()):,} differ"


def _lacks_only(student: Any, teacher: Any) -> bool:
    """Whether the student's tokens are all the teacher's too, under the same ids."""
    return student.get_vocab().items() <= teacher.get_vocab().items()


def _token(tokens: Mapping[int, str], i: int) -> str:
    return repr(tokens[i]) if i in tokens else "no token"


def same_prompt(
    student: Any,
    teacher: Any,
    chats: Sequence[Sequence[Message]],
    student_kwargs: Mapping[str, Any],
    teacher_kwargs: Mapping[str, Any],
    tools: Sequence[list[Any] | None] | None = None,
) -> str | None:
    """None where both render every prompt to the same token ids; else the first prompt that differs, and the place."""
    for number, chat in enumerate(chats):
        which = f"the prompt {str(chat[-1].get('content'))[:40]!r}"
        offered = (tools[number] if tools is not None else None) or None
        sides = []
        for backend, kwargs, who in ((student, student_kwargs, "student"), (teacher, teacher_kwargs, "teacher")):
            try:
                sides.append(mask_prompt(chat, backend, tools=offered, template_kwargs=kwargs).input_ids)
            except DataError as error:
                return f"{which}: {error.message} (the {who}'s)"
        if sides[0] != sides[1]:
            at = next((i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
            shown = [_around(backend, ids, at) for backend, ids in zip((student, teacher), sides, strict=True)]
            return f"{which}, token {at + 1}: {shown[0]} for the student, {shown[1]} for the teacher"
    return None


def _around(backend: Any, ids: Sequence[int], at: int) -> str:
    """A few tokens before and after a place, as text."""
    if at >= len(ids):
        return f"{backend.decode(list(ids[max(0, at - 3) :]))!r} and its end"
    return repr(backend.decode(list(ids[max(0, at - 3) : at + 8])))


def same_end(
    student: Any,
    teacher: Any,
    student_ends: Iterable[int],
    teacher_ends: Iterable[int],
    teacher_kwargs: Mapping[str, Any] | None = None,
) -> str | None:
    """None where the token with which the teacher ends an answer ends the student's too.

    A base student beside a chat teacher is the usual case: it would write on past `<|im_end|>`, for ever.

    Args:
        student_ends, teacher_ends: token ids at which each stops (see `end_tokens`).
    """
    known = set(student_ends)
    end = _turn_end(teacher, set(teacher_ends), teacher_kwargs or {})
    if end in known:
        return None
    token = teacher.convert_ids_to_tokens(end)
    stops = ", ".join(repr(student.convert_ids_to_tokens(i)) for i in sorted(known)) or "nothing"
    return f"the teacher ends its answers with {token!r}, at which the student does not stop (it does at {stops})"


def _turn_end(backend: Any, ends: set[int], kwargs: Mapping[str, Any]) -> int:
    """The end token that the chat template puts behind an answer; the tokenizer's own where it puts none."""
    answer = "fourteen"
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer}]
    try:
        text = backend.apply_chat_template(chat, tokenize=False, **dict(kwargs))
    except Exception:  # a template may raise anything
        return int(backend.eos_token_id)
    behind = backend(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    return next((i for i in behind if i in ends), int(backend.eos_token_id))


def end_tokens(backend: Any, folder: Path | None) -> set[int]:
    """Token ids at which a model stops: the tokenizer's end token, and those of the model's generation settings."""
    ends = {int(backend.eos_token_id)} if backend.eos_token_id is not None else set()
    for name in ("generation_config.json", "config.json"):
        found = read_object(folder / name).get("eos_token_id") if folder is not None else None
        if found is not None:
            return ends | set(found if isinstance(found, list) else [found])
    return ends


def larger(student_parameters: int | None, teacher_parameters: int | None) -> str | None:
    """A doubt where the student has more parameters than the teacher; None where it has not, or nobody knows."""
    if not student_parameters or not teacher_parameters or student_parameters <= teacher_parameters:
        return None
    sizes = f"{student_parameters / 1e6:,.1f} against {teacher_parameters / 1e6:,.1f} million parameters"
    return f"the student is larger than its teacher ({sizes})"


def parameters_of(folder: Path) -> int | None:
    """Parameters of a model folder, from the headers of its weights or, without weights, from their index.

    4-bit weights, stored two in a byte, count as two. None where neither is there.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return sum(map(_elements, files))
    meta = read_object(folder / "model.safetensors.index.json").get("metadata") or {}
    if "total_parameters" in meta:
        return int(meta["total_parameters"])
    config = read_object(folder / "config.json")
    width = _BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    return int(meta["total_size"]) // width if "total_size" in meta else None


def _elements(path: Path) -> int:
    return sum(math.prod(t["shape"]) * (2 if t["dtype"] == "U8" else 1) for t in tensors_of(path).values())


def _sizes(recipe: Recipe) -> str | None:
    assert recipe.teacher is not None
    folders = [_folder(recipe.model.base, "model.base"), _folder(recipe.teacher.model, "teacher.model")]
    student, teacher = (parameters_of(folder) if folder is not None else None for folder in folders)
    return larger(student, teacher)


def _folder(text: str, place: str) -> Path | None:
    """A model's folder without its weights; None where it cannot be had."""
    try:
        return fetch(parse_ref(text), False, place)
    except ValueError:  # a RecipeError is one too
        return None
