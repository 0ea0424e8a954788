"""The generate stage with a real teacher: what it leaves, what a rerun asks for, shards, rounds, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_cli, run_train
from teaching import PROMPTS, lines, recipe_file, results, rows_of, taught

from distill.journal import read_journal
from recipes.errors import EngineError, GateError, RecipeError
from recipes.gate import examine
from recipes.lineage import read_manifest, verify
from recipes.load import load_recipe
from recipes.student import require_taught, student_recipe
from scripts.teach import verifier

STATS = ["requests", "calls_made", "from_journal", "completions", "prompt_tokens", "completion_tokens", "truncated"]
HELD_OUT = 12  # six are measured, the others can be watched


def test_rows_figures_and_manifests_and_a_rerun_that_asks_nothing(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    recipe, stats, said = taught(path)
    folder = recipe.run_dir / "teacher"
    assert list(stats) == [*STATS, "kept", "rejected", "paid", "seconds", "cost"]
    assert stats["requests"] == stats["calls_made"] == stats["completions"] == PROMPTS + HELD_OUT
    assert json.loads((folder / "stats.json").read_text()) == stats
    rows = rows_of(recipe)
    assert len(rows) == stats["kept"] == PROMPTS - sum(stats["rejected"].values())
    for row in rows:
        assert row["_teacher"] == "embedded:tiny-teacher" and row["messages"][-1]["role"] == "assistant"
    recorded = read_journal(folder / "journal")
    assert {row["_gen"] for row in rows} <= set(recorded) and len(recorded) == stats["completions"]
    assert sum(c.completion_tokens for c in recorded.values()) == stats["completion_tokens"]
    identity = json.loads((folder / "identity.json").read_text())
    for made in (folder, folder / "rows"):
        manifest = read_manifest(made)
        assert manifest is not None and len(identity["sha256"]) == 64
        assert manifest["parents"] == [{"role": "teacher", "ref": "embedded:tiny-teacher", "identity": identity}]
    assert verify(folder) == verify(folder / "rows") == verify(folder / "heldout") == []
    assert any("greedy" in line for line in said)
    # The held-out rows have the teacher's answers as their text, and their own beside them.
    answers = {line["_prompt"]: line for line in lines(folder / "answers.jsonl")}
    assert len(answers) == HELD_OUT
    for row in rows_of(recipe, "heldout"):
        line = answers[row["_prompt"]]
        assert row["_reference"] == line["reference"]
        assert row["messages"][-1]["content"] == line["reference" if line["truncated"] else "answer"]
    before, stamp = results(recipe), (folder / "manifest.json").read_bytes()
    _, again, said = taught(path)
    assert (again["calls_made"], again["from_journal"]) == (0, PROMPTS + HELD_OUT)
    assert not any("starting the teacher" in line for line in said)
    assert results(recipe) == before and (folder / "manifest.json").read_bytes() == stamp


def test_raised_max_tokens_asks_again_for_cut_answers_alone(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    _, short, _ = taught(path, "teacher.sampling.max_tokens=4")
    assert 0 < short["truncated"] < short["completions"]
    _, longer, _ = taught(path, "teacher.sampling.max_tokens=32")
    assert longer["calls_made"] == short["truncated"]
    fresh = recipe_file(tmp_path, output=str(tmp_path / "fresh"))
    recipe, whole, _ = taught(fresh)
    assert whole["completion_tokens"] == longer["completion_tokens"]  # a greedy answer goes on as it began
    assert results(recipe) == results(load_recipe(recipe_file(tmp_path)))


def test_more_samples_ask_for_the_new_ones_alone(tmp_path: Path) -> None:
    drawn = {"teacher": {"model": "embedded:tiny-teacher", "sampling": {"max_tokens": 32, "temperature": 1.0}}}
    path = recipe_file(tmp_path, **drawn)
    _, two, _ = taught(path, "teacher.samples=2")
    _, three, _ = taught(path, "teacher.samples=3")
    assert two["calls_made"] == 2 * PROMPTS + HELD_OUT
    assert three["calls_made"] == PROMPTS and three["completions"] == 3 * PROMPTS + HELD_OUT


def test_shards_make_what_one_machine_makes(tmp_path: Path) -> None:
    one, _, _ = taught(recipe_file(tmp_path, output=str(tmp_path / "one")))
    path = recipe_file(tmp_path, output=str(tmp_path / "many"))
    calls = [taught(path, shard=(i, 3))[1]["calls_made"] for i in (1, 2, 3)]
    assert sum(calls) == PROMPTS and all(calls)
    with pytest.raises(EngineError, match="no finished work of the teacher"):
        require_taught(load_recipe(path))
    many, stats, _ = taught(path)
    assert stats["calls_made"] == HELD_OUT and stats["from_journal"] == PROMPTS
    assert results(many) == results(one)


def test_verified_answers_and_the_best_of_several(tmp_path: Path) -> None:
    drawn = {"model": "embedded:tiny-teacher", "sampling": {"max_tokens": 32, "temperature": 1.0}, "samples": 4}
    path = recipe_file(tmp_path, teacher={**drawn, "verify": ["exact"], "keep": "best", "filters": ["verified"]})
    recipe = load_recipe(path)
    _, stats, _ = taught(path, verify=verifier(recipe))
    gold = {row["_prompt"]: row["messages"][-1]["content"] for row in rows_of(recipe)}
    assert stats["rejected"]["verified"] > 0
    assert stats["kept"] == len(gold) == len(rows_of(recipe))  # one answer to a prompt
    rejects = lines(recipe.run_dir / "teacher" / "rejected.jsonl")
    assert len(rejects) == sum(stats["rejected"].values()) == 4 * PROMPTS - stats["kept"]
    summary = json.loads((recipe.run_dir / "teacher" / "summary.json").read_text())
    assert summary["candidates"] == 4 * PROMPTS and summary["rejected"] == stats["rejected"]


def test_rounds_make_questions_of_passages_and_answers_of_questions(tmp_path: Path) -> None:
    passages = tmp_path / "clauses.txt"
    rent = "The Tenant pays a rent of EUR 900 within ten days.\n\nEither party may terminate on thirty days' notice."
    passages.write_text(rent, encoding="utf-8")
    rounds = [
        {"write": "question", "ask": "{passage}\n\nState the type of this clause.", "samples": 1, "split": "lines"},
        {"write": "answer", "ask": "{passage}\n\n{question}", "student_sees": "About {question}: {passage}"},
    ]
    data = {"train": [{"path": str(passages)}], "requests": ["summaries"]}
    data["requests"] = [{"task": "summaries"}]
    teacher = {"model": "embedded:tiny-teacher", "sampling": {"max_tokens": 32}, "rounds": rounds, "filters": []}
    recipe, stats, _ = taught(recipe_file(tmp_path, data=data, teacher=teacher))
    rows = rows_of(recipe)
    assert stats["requests"] == 2 and len(rows) == 1
    asked = rows[0]["messages"][0]["content"]
    assert asked.startswith("About ") and asked.endswith(rent) and "{" not in asked


def test_a_wording_that_reads_what_is_not_there_names_the_row(tmp_path: Path) -> None:
    rounds = [{"write": "answer", "ask": "{passge}"}]
    path = recipe_file(tmp_path, teacher={"model": "embedded:tiny-teacher", "rounds": rounds})
    with pytest.raises(ValueError, match=r"legal.*has no column 'passge'"):
        taught(path)


def test_nothing_is_asked_of_a_teacher_whose_terms_forbid_it(tmp_path: Path) -> None:
    engine = {"http": {"urls": ["http://127.0.0.1:9/v1"]}}  # nobody listens there: a request would fail otherwise
    path = recipe_file(
        tmp_path,
        use={"purpose": "commercial", "distribute": True, "competes_with": []},
        teacher={"model": "openai:gpt-4o", "engine": engine},
    )
    with pytest.raises(GateError):
        taught(path)
    done = run_cli("generate", str(path), cwd=tmp_path)
    assert done.returncode == 3 and "gpt-4o" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "teacher").exists()
    # A judge whose marks decide what the student learns is a part of its lineage as well.
    judge = {"judge": {"model": "openai:gpt-4o", "url": "http://127.0.0.1:9/v1"}}
    judged = recipe_file(
        tmp_path, use={"purpose": "commercial", "distribute": True, "competes_with": []}, teacher={"verify": [judge]}
    )
    with pytest.raises(GateError, match="gpt-4o"):
        taught(judged)


def test_training_waits_for_the_teacher_and_notices_another_recipe(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    done = run_train(path)
    assert done.returncode == 6 and "run retort generate with this recipe" in done.stderr
    recipe, _, _ = taught(path)
    require_taught(recipe)
    with pytest.raises(EngineError, match=r"teacher\.filters changed"):
        require_taught(load_recipe(path, ["teacher.filters=[empty]"]))
    require_taught(load_recipe(path, ["train.learning_rate=0.001", "teacher.price={hour: 2.0}"]))
    server = "urls: ['http://127.0.0.1:9/v1']"
    for same in ("transformers: {batch_size: 2}", "vllm: {memory: 0.5}", f"http: {{{server}, parallel: 2}}"):
        require_taught(load_recipe(path, [f"teacher.engine={{{same}}}"]))
    for other, key in {
        "transformers: {quantization: nf4}": "quantization",
        "vllm: {extra: {quantization: fp8}}": "quantization",
        f"http: {{{server}, served_as: another}}": "served_as",
        f"http: {{{server}, extra_body: {{min_tokens: 9}}}}": "extra_body",
    }.items():
        with pytest.raises(EngineError, match=rf"made by another recipe \(teacher\.engine\.{key} changed\)"):
            require_taught(load_recipe(path, [f"teacher.engine={{{other}}}"]))
    student = student_recipe(recipe, recipe.run_dir)
    assert student.method.type == "sft" and str(student.data.train[0]).endswith("teacher/rows")
    # Whoever uses the rows elsewhere inherits their lineage.
    verdict, _ = examine(load_recipe(path, ["teacher=null", "method=sft", f"data.train=[{{path: {recipe.run_dir}/teacher/rows}}]", "data.eval=null", "use={purpose: commercial, distribute: true}"]))  # fmt: skip  # noqa: E501
    assert any("tiny-teacher" in reason.asset for reason in verdict.reasons)


def test_what_a_recipe_may_not_ask(tmp_path: Path) -> None:
    wrong = {
        "method={type: distill, mode: logits}": "mode logits needs teacher.logits",
        "teacher.filters=[verified]": "needs teacher.verify",
        "teacher.rounds=[{write: question, ask: x}]": "the last round must write the answer",
        "method={type: distill, mode: preference, pairs: judged}": "pairs: judged needs teacher.verify",
        "method.mode=sequense": "did you mean sequence?",
        "teacher.engine=htp": "did you mean http?",
    }
    path = recipe_file(tmp_path)
    for change, words in wrong.items():
        with pytest.raises(RecipeError) as found:
            load_recipe(path, [change])
        assert words in str(found.value), change
    with pytest.raises(RecipeError, match="the method sft asks no teacher; set method: distill"):
        require_taught(load_recipe(path, ["method=sft"]))
    with pytest.raises(RecipeError, match="temperature"):
        taught(path, "teacher.samples=2", "teacher.sampling.temperature=0.0")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequence", "logits", "preference", "on_policy"])
def test_a_student_of_every_mode_trains_from_the_command_line(mode: str, tmp_path: Path) -> None:
    teacher = {"model": "embedded:tiny-teacher", "sampling": {"max_tokens": 16}, "logits": {"k": 8}}
    method = {"type": "distill", "mode": mode}
    if mode == "on_policy":
        method |= {"prompts_per_step": 4, "max_new_tokens": 8}
    changes = {"eval": {"samples": 6, "max_new_tokens": 8, "resamples": 200}}
    path = recipe_file(tmp_path, method=method, teacher=teacher, **changes)
    done = run_cli("run", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    manifest = read_manifest(run)
    assert manifest is not None and manifest["recipe"]["method"]["mode"] == mode
    assert any(parent["role"] == "teacher" and "sha256" in parent["identity"] for parent in manifest["parents"])
    assert verify(run) == []
    if mode != "preference":
        evaluation = json.loads((run / "eval.json").read_text())
        assert 0 <= evaluation["metrics"]["exact_match"]["teacher"]["value"] <= 1
    if mode != "logits":
        return
    again = run_cli("run", str(path), cwd=tmp_path)
    assert again.returncode == 0 and "holds the finished run" in again.stdout
    # Another learning rate is another run, and asks the teacher nothing.
    other = run_cli("run", str(path), "--set", "train.learning_rate=0.001", cwd=tmp_path)
    assert other.returncode == 0 and "(0 asked for" in other.stdout and "was moved to" in other.stdout
