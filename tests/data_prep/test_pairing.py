"""Wrong pairs of teacher and student are refused by what is wrong with them, right ones pass; sizes say nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, build_model

from data_prep.earlier_teacher import changed_teacher, teacher_parent, teachers_of
from data_prep.pairing import (
    end_tokens,
    larger,
    load_teacher_tokenizer,
    parameters_of,
    require_pair,
    same_end,
    same_prompt,
    same_tokens,
)
from data_prep.tokens import load_tokenizer
from recipes.errors import RecipeError
from recipes.lineage import write_manifest
from recipes.load import load_recipe
from recipes.schema import Model, Recipe

CHATS = [[{"role": "user", "content": f"What colour is the {thing}?"}] for thing in ("house", "door")]


@pytest.fixture
def pair(make_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe whose teacher is a copy of the student's folder, after `change(folder)`."""

    def make(change: Callable[[Path], Any] | None = None, method: Any = None, **sections: Any) -> Recipe:
        folder = tmp_path / "teacher"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_model, folder)
        if change is not None:
            change(folder)
        asked = {"type": "distill", "mode": "on_policy", **(method or {})}
        if asked["mode"] == "on_policy":
            asked["max_new_tokens"] = 8
        teacher = {"model": str(folder), **sections.pop("teacher", {})}
        return load_recipe(make_recipe(method=asked, teacher=teacher, **sections))

    return make


def checked(recipe: Recipe) -> list[str]:
    return require_pair(recipe, load_tokenizer(recipe.model), load_teacher_tokenizer(recipe), CHATS)


def edited(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_two_tokens(folder: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edited(folder, "tokenizer.json", swap)


def add_token(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML)


def other_end(folder: Path) -> None:
    """As a chat model beside its base: the same tokens, and another of them ends the turn."""
    edited(folder, "tokenizer_config.json", lambda c: c.update(eos_token="<|im_start|>"))
    for name in ("generation_config.json", "config.json"):
        edited(folder, name, lambda c: c.update(eos_token_id=1))
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("'<|im_end|>' }}{% endgeneration", "'<|im_start|>' }}{% endgeneration"))


def pad_embeddings(folder: Path) -> None:
    """Qwen's larger models have more embedding rows than the smaller ones, for the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + 64)
    model.save_pretrained(folder)


def test_a_copy_fits_and_so_does_one_with_padded_embeddings(pair: Callable[..., Recipe]) -> None:
    assert checked(pair()) == []
    assert checked(pair(pad_embeddings)) == []
    assert checked(pair(pad_embeddings, {"mode": "logits"}, teacher={"logits": {}})) == []


@pytest.mark.parametrize("mode", ["on_policy", "logits"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap_two_tokens, ["is 'a' here and 'b' there", "is 'b' here and 'a' there", "2 of 3"]),
        (add_token, ["is no token here and '<think>' there", "1 of 3", "set model.tokenizer: /"]),
        (other_template, ["'What colour is the house?'", "'<|im_start|>syst", "model.chat_template"]),
        (other_end, ["ends its answers with '<|im_start|>'", "it does at '<|im_end|>'", "chat version"]),
    ],
    ids=["two tokens swapped", "one token more", "another template", "another end"],
)
def test_a_wrong_pair_is_refused_by_what_is_wrong(
    pair: Callable[..., Recipe], change: Callable[[Path], Any], says: list[str], mode: str
) -> None:
    recipe = pair(change, {"mode": mode}, teacher={"logits": {}} if mode == "logits" else {})
    with pytest.raises(RecipeError) as caught:
        checked(recipe)
    text = str(caught.value)
    assert text.startswith("teacher.model: ") and "\n" not in text
    assert [part for part in says if part not in text] == [], text
    assert ("cross_tokenizer" in text) == (change is swap_two_tokens and mode == "on_policy")


@pytest.mark.parametrize("change", [swap_two_tokens, other_template, other_end])
@pytest.mark.parametrize(
    "method", [{"mode": "sequence"}, {"mode": "preference"}, {"mode": "on_policy", "cross_tokenizer": True}]
)
def test_where_text_is_passed_on_any_pair_will_do(
    pair: Callable[..., Recipe], change: Callable[[Path], Any], method: Any
) -> None:
    doubts = checked(pair(change, method))
    equal = method["mode"] == "on_policy" and change is not swap_two_tokens
    assert len(doubts) == equal and all("without it the loss is exact" in doubt for doubt in doubts)


def test_with_the_teachers_tokenizer_a_base_stops_where_the_teacher_does(
    pair: Callable[..., Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    """The remedy that the refusal names."""
    recipe = pair(other_end, model={"base": str(tiny_model), "tokenizer": str(tmp_path / "teacher")})
    assert checked(recipe) == []


def test_template_settings_are_part_of_the_comparison(pair: Callable[..., Recipe], tiny_model: Path) -> None:
    def switched(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text("{% if brief %}Be brief.{% endif %}" + path.read_text())

    assert checked(pair(switched)) == []
    with pytest.raises(RecipeError, match="read prompts differently: the prompt 'What colour is the house"):
        checked(pair(switched, teacher={"template_kwargs": {"brief": True}}))


def test_a_template_that_refuses_a_prompt_is_named(pair: Callable[..., Recipe]) -> None:
    def strict(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text("{{ raise_exception('no system messages') if messages[0].role == 'system' }}" + CHATML)

    recipe = pair(strict)
    student, teacher = load_tokenizer(recipe.model), load_teacher_tokenizer(recipe)
    assert teacher is not None and require_pair(recipe, student, teacher, CHATS) == []
    chat = [[{"role": "system", "content": "Be brief."}, *CHATS[0]]]
    with pytest.raises(RecipeError, match=r"refuses the prompt: no system messages \(the teacher's\)"):
        require_pair(recipe, student, teacher, chat)


def test_prompts_in_the_middle_are_compared_and_named(tiny_model: Path) -> None:
    backend = load_tokenizer(Model(base=str(tiny_model))).backend
    other = load_tokenizer(Model(base=str(tiny_model))).backend
    other.chat_template = CHATML.replace("message.content", "message.content | replace('door', 'gate')")
    found = same_prompt(backend, other, CHATS, {}, {})
    assert found is not None and found.startswith("the prompt 'What colour is the door?', token ")
    assert "door" in found.partition("token")[2] and "gate" in found
    assert same_prompt(backend, other, CHATS[:1], {}, {}) is None
    other.chat_template = CHATML.replace("assistant\\n' }}{%- endif", "assistant\\n<think>' }}{%- endif")
    found = same_prompt(backend, other, CHATS, {}, {})
    assert found is not None and "and its end for the student" in found and "<think>" in found


def test_what_ends_a_turn_is_read_from_the_template(tiny_model: Path) -> None:
    """Gemma's tokenizer ends texts with one token and its chats with another."""
    backend = load_tokenizer(Model(base=str(tiny_model))).backend
    gemma = load_tokenizer(Model(base=str(tiny_model))).backend
    gemma.eos_token = "<|pad|>"
    pad, start, end = range(3)
    assert same_end(backend, gemma, {pad}, {pad, end}) is not None
    assert same_end(backend, gemma, {end}, {pad, end}) is None
    gemma.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert same_end(backend, gemma, {pad}, {pad, end}) is None, "nothing stands behind the answer: the end of the text"
    assert end_tokens(backend, tiny_model) == {end} and end_tokens(backend, None) == {end}
    assert start not in end_tokens(gemma, tiny_model) and end_tokens(gemma, tiny_model) == {pad, end}


def test_a_larger_student_is_doubted(pair: Callable[..., Recipe], tmp_path: Path, tiny_model: Path) -> None:
    assert larger(10, 10) is None and larger(None, 10) is None and larger(10, None) is None
    small = build_model(tmp_path / "small", tie_word_embeddings=True)
    recipe = pair(lambda folder: shutil.copy(small / "model.safetensors", folder), {"mode": "sequence"})
    (doubt,) = checked(recipe)
    assert doubt == "the student is larger than its teacher (0.1 against 0.1 million parameters)"
    from transformers import AutoModelForCausalLM

    for folder in (tiny_model, small):
        assert parameters_of(folder) == AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def test_parameters_without_weights_come_from_the_index(tmp_path: Path) -> None:
    assert parameters_of(tmp_path) is None
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 4000}}))
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    assert parameters_of(tmp_path) == 1000
    index.write_text(json.dumps({"metadata": {"total_size": 4000, "total_parameters": 1900}}))
    assert parameters_of(tmp_path) == 1900


def test_four_bit_weights_count_as_what_they_stand_for(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(50, dtype=torch.uint8), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    assert parameters_of(tmp_path) == 107


def test_another_teacher_than_before_is_doubted(pair: Callable[..., Recipe], tiny_model: Path, tmp_path: Path) -> None:
    """The run before last had a teacher; the one between only trained on."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, recipe in (
        (first, {"teacher": {"model": "org/first@abc"}, "model": {"run": None}}),
        (second, {"teacher": None, "model": {"run": str(first)}}),
    ):
        folder.mkdir()
        write_manifest(folder, {"kind": "run", "recipe": recipe})
    model = Model(base=str(tiny_model), run=str(second))
    recipe = pair().model_copy(update={"model": model})
    (doubt,) = checked(recipe)
    assert doubt == f"the student learnt from org/first@abc in {first}, and now from {tmp_path / 'teacher'}"
    assert recipe.teacher is not None
    same = recipe.teacher.model_copy(update={"model": "org/first@abc"})
    assert changed_teacher(recipe.model_copy(update={"teacher": same})) is None
    assert changed_teacher(pair()) is None and teachers_of({}) == {}


def continues(recipe: Recipe, run: Path, manifest: dict[str, Any], teacher: str | None = None) -> str | None:
    """The doubt of a recipe that goes on from a run with this manifest, by another spelling of its teacher if given."""
    run.mkdir(exist_ok=True)
    write_manifest(run, {"kind": "run", **manifest})
    assert recipe.teacher is not None
    named = recipe.teacher.model_copy(update={"model": teacher or recipe.teacher.model})
    model = recipe.model.model_copy(update={"run": str(run)})
    return changed_teacher(recipe.model_copy(update={"teacher": named, "model": model}))


def test_the_same_folder_with_other_weights_is_another_teacher(pair: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, run, folder = pair(), tmp_path / "first", tmp_path / "teacher"
    first = {"recipe": recipe.resolved(), "parents": [teacher_parent(recipe)]}
    assert set(first["parents"][0]["identity"]) == {"sha256"}
    assert continues(recipe, run, first) is None
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert continues(recipe, run, first, str(moved)) is None  # the same weights elsewhere
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b" ")
    assert continues(recipe, run, first) == f"the student learnt from {folder} in {run}, which has other weights now"
    assert continues(recipe, run, first, str(moved)) is None


def test_a_folder_is_the_same_however_it_is_written(pair: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, run = pair(), tmp_path / "first"
    (tmp_path / "link").symlink_to(tmp_path / "teacher")
    for spelling in (f"{tmp_path}/first/../teacher", f"{tmp_path}/link", f"{tmp_path}/teacher/"):
        assert continues(recipe, run, {"recipe": {"teacher": {"model": spelling}}}) is None


@pytest.mark.parametrize("where", ["parents", "generators", "rows"])
def test_a_run_without_a_teacher_of_its_own_may_have_learnt_from_one(
    pair: Callable[..., Recipe], tmp_path: Path, where: str
) -> None:
    recipe, run, rows = pair(), tmp_path / "first", tmp_path / "rows"
    for name, same in (("org/first", False), (str(tmp_path / "teacher"), True)):
        parents = [{"role": "base", "ref": "embedded:tiny"}, {"role": "teacher", "ref": name}]
        rows.mkdir(exist_ok=True)
        write_manifest(rows, {"kind": "data", "parents": parents})
        given = {
            "parents": {"parents": parents},
            "generators": {"generators": {name: 24}},
            "rows": {"inputs": [{"role": "eval", "ref": "x"}, {"role": "data", "ref": str(rows)}]},
        }[where]
        doubt = continues(recipe, run, {"recipe": {"teacher": None}, **given})
        wanted = f"the student learnt from org/first in {run}, and now from {tmp_path / 'teacher'}"
        assert doubt == (None if same else wanted)


def test_a_service_has_no_tokenizer_unless_the_mode_needs_one(pair: Callable[..., Recipe], tiny_model: Path) -> None:
    engine = {"http": {"urls": ["http://127.0.0.1:9/v1"]}}
    teacher = {"model": "openai:gpt-4o", "engine": engine}
    assert load_teacher_tokenizer(pair(None, {"mode": "sequence"}, teacher=teacher)) is None
    recipe = pair(None, {"mode": "logits"}, teacher={**teacher, "logits": {}})
    with pytest.raises(RecipeError, match=r"^teacher\.tokenizer: 'openai:gpt-4o' is no model whose tokenizer"):
        load_teacher_tokenizer(recipe)
    named = pair(None, {"mode": "logits"}, teacher={**teacher, "logits": {}, "tokenizer": str(tiny_model)})
    assert checked(named) == []
    wrong = pair(None, {"mode": "sequence"}, teacher={**teacher, "tokenizer": "./nowhere"})
    with pytest.raises(RecipeError, match=r"^teacher\.tokenizer: "):
        load_teacher_tokenizer(wrong)
    with pytest.raises(RecipeError, match=r"^teacher\.model: model folder \./nowhere does not exist"):
        load_teacher_tokenizer(pair(teacher={"model": "./nowhere"}))


def test_real_tokenizers_and_templates(realdata: Path) -> None:
    from transformers import AutoTokenizer

    def load(name: str) -> Any:
        return AutoTokenizer.from_pretrained(realdata / "tokenizers" / name)

    qwen, llama = load("qwen2"), load("llama2-chat")
    assert same_tokens(qwen, load("qwen2")) is None
    found = same_tokens(qwen, llama)
    assert found is not None and found.startswith("id 0 is '!' here and '<unk>' there; ")
    assert found.endswith("; 151,640 of 151,646 differ")

    later = load("qwen2")
    later.add_tokens(["<tool_call>", "</tool_call>"])  # as Qwen2.5's, beside Qwen2's
    found = same_tokens(qwen, later)
    assert found == (
        "id 151646 is no token here and '<tool_call>' there; id 151647 is no token here and '</tool_call>' there; "
        "2 of 151,648 differ"
    )

    chats = [[{"role": "user", "content": "Is the door open?"}]]
    sides = [load("qwen2"), load("qwen2")]
    for side, name in zip(sides, ("Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B"), strict=True):
        side.chat_template = (realdata / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    found = same_prompt(*sides, chats, {}, {})
    assert found is not None and "the prompt 'Is the door open?', token 2: '<|im_start|>system" in found
    asked = [[{"role": "system", "content": "Answer."}, *chats[0]]]
    assert same_prompt(*sides, asked, {}, {}) is None, "with a system message of one's own they agree"
    found = same_prompt(*sides, asked, {}, {"enable_thinking": False})
    assert found is not None and "<think>" in found

    chat_end, text_end = 151645, 151643
    assert same_end(sides[0], sides[1], {text_end}, {chat_end, text_end}) == (
        "the teacher ends its answers with '<|im_end|>', at which the student does not stop (it does at "
        "'<|endoftext|>')"
    )
    assert same_end(sides[0], sides[1], {chat_end, text_end}, {chat_end}) is None
