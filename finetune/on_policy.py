"""On-policy distillation: the student answers, and the teacher's distribution at every token is what it learns.

The loop, the loss and the sampling are TRL's (Agarwal et al. 2024, "GKD"); prompts are the prepared token ids, in an
order drawn here from the seed: TRL's own sampler keeps its generator in memory, so that a resumed run would go on in
another order (trl 1.16, trainer/utils.py, RepeatSampler).

With different tokenizers the same is done by TRL's GOLD trainer, which aligns the two by the bytes of the answer. It is
experimental there and here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from data_prep.masks import mask_prompt
from data_prep.pairing import end_tokens, load_teacher_tokenizer, require_pair
from data_prep.rows import before_answer
from data_prep.tokens import Tokenizer, fetch
from finetune.arguments import Job, common_arguments, make_trainer
from finetune.layout import Device, Layout, find_device
from finetune.models import load_base
from finetune.policy import numbered_prompts, of_prepared, vllm_arguments
from finetune.runs import say
from recipes.errors import DataError, EngineError, RecipeError
from recipes.lineage import read_manifest, verify
from recipes.refs import parse_ref
from recipes.schema import Model, Recipe
from recipes.schema_method import DistillOnPolicy

Row = dict[str, Any]
NEVER = -100.0  # logit of a token that the teacher does not have: e**-100 of its likeliest token's probability


def check_on_policy(recipe: Recipe, tokenizer: Tokenizer, rows: Sequence[Row]) -> list[str]:
    """Find out what is wrong with the engine or the pair of models before either is loaded. Returns doubts to print.

    Args:
        rows: prepared prompts (`messages`, `tools`).

    Raises:
        RecipeError: the teacher does not fit the student, or cannot run beside it. EngineError: vLLM is missing.
    """
    method, teacher = recipe.method, recipe.teacher
    assert isinstance(method, DistillOnPolicy) and teacher is not None
    if method.vllm is not None and importlib.util.find_spec("vllm") is None:
        raise EngineError("the package vllm is not installed", "method.vllm", "pip install vllm, or leave vllm out")
    asked = teacher.engine.options.device
    if asked != "auto" and asked != find_device(recipe.train.device).kind:
        place = "teacher.engine.transformers.device"
        raise RecipeError("mode on_policy runs the teacher on the student's device", place, "leave it out")
    chats = [before_answer(row["messages"]) for row in rows]
    return require_pair(recipe, tokenizer, load_teacher_tokenizer(recipe), chats, [row.get("tools") for row in rows])


def build_on_policy(job: Job) -> Any:
    """TRL's trainer of on-policy distillation over prepared prompts, with the recipe's teacher beside the student.

    Raises:
        RecipeError: the teacher cannot be loaded, or fits the student neither by tokens nor otherwise.
    """
    method = job.recipe.method
    assert isinstance(method, DistillOnPolicy) and job.recipe.teacher is not None
    tokenizer = load_teacher_tokenizer(job.recipe)
    assert tokenizer is not None  # this mode needs it, and its absence is an error there
    say(f"loading the teacher {job.recipe.teacher.model}")
    teacher = load_teacher(job.recipe, job.layout, tokenizer)
    return (_build_gold if method.cross_tokenizer else _build_distillation)(job, teacher, tokenizer)


def load_teacher(recipe: Recipe, layout: Layout, tokenizer: Tokenizer) -> Any:
    """The recipe's teacher as a frozen transformers model, on the student's device.

    Raises:
        RecipeError: it cannot be fetched or loaded. DataError: its files differ from its manifest.
    """
    asked = recipe.teacher
    assert asked is not None
    options = asked.engine.options
    folder = fetch(parse_ref(asked.model), True, "teacher.model")
    if read_manifest(folder) is not None and (wrong := verify(folder)):
        raise DataError(f"differs from its manifest: {', '.join(wrong[:4])}", str(folder), "get the model again")
    model = Model(
        base=asked.model,
        quantization=options.quantization,
        dtype=layout.dtype if options.dtype == "auto" else options.dtype,
        attention=recipe.model.attention,
    )
    try:
        teacher = load_base(
            recipe.model_copy(update={"model": model}), tokenizer, Device(layout.device, 0, layout.device), folder
        )
    except RecipeError as error:
        raise RecipeError(error.message, "teacher.model", error.remedy) from None
    return teacher.requires_grad_(False).eval()


def fit_head(teacher: Any, student: Any) -> None:
    """Give the teacher's output as many rows as the student's, where they differ in rows that are no tokens (Qwen).

    Rows that the student lacks are cut off: they stand for nothing. Rows that only the student has get a logit that
    makes them impossible, so that the student learns to leave them alone.
    """
    wanted, present = (model.config.get_text_config().vocab_size for model in (student, teacher))
    if wanted == present:
        return
    teacher.resize_token_embeddings(wanted, mean_resizing=False)
    if wanted > present:
        head = teacher.get_output_embeddings()
        bias = torch.zeros(wanted, dtype=head.weight.dtype, device=head.weight.device)
        if head.bias is not None:
            bias += head.bias.data
        bias[present:] = NEVER
        head.weight.data[present:] = 0
        head.bias = torch.nn.Parameter(bias, requires_grad=False)


def _order(job: Job) -> Any:
    method = job.recipe.method
    assert isinstance(method, DistillOnPolicy)
    return numbered_prompts(len(job.rows), job.layout.steps * method.prompts_per_step, job.recipe.seed)


def _build_distillation(job: Job, teacher: Any, tokenizer: Tokenizer) -> Any:
    """TRL's DistillationTrainer: the divergence from the teacher over the whole vocabulary, chunk by chunk."""
    from trl import DistillationConfig, DistillationTrainer

    method = job.recipe.method
    assert isinstance(method, DistillOnPolicy)
    config = DistillationConfig(
        **common_arguments(job),
        beta=method.beta,
        max_completion_length=method.max_new_tokens,
        shuffle_dataset=False,
        **sampling(method),
        **_engine(method),
    )
    fit_head(teacher, job.model)
    return make_trainer(of_prepared(DistillationTrainer, job.rows), job, config, _order(job), teacher_model=teacher)


def sampling(method: DistillOnPolicy) -> dict[str, Any]:
    """How completions are drawn, in the names that TRL and transformers share."""
    return {"temperature": method.temperature, "top_p": method.top_p, "top_k": method.top_k}


def _engine(method: DistillOnPolicy) -> dict[str, Any]:
    return {} if method.vllm is None else vllm_arguments(method.vllm)


def _build_gold(job: Job, teacher: Any, tokenizer: Tokenizer) -> Any:
    """TRL's GOLDTrainer: answers aligned by their bytes; tokens that both have are compared as such (hybrid loss).

    What differs from TRL's defaults:
    - The teacher reads the prompt in its own chat template, not in the student's as text.
    - Tokens of both are compared by name. Sorted probabilities alone, the original ULD, do not say which token is
      meant: on the embedded pair 20 steps of it moved the student away from its teacher.
    - Where one side needs several tokens, their probabilities are multiplied in the order of the chain rule
      (`bayesian`); the default takes the distribution at the first of them, which predicts the second.
    - The token that ends the answer counts, or the student would never learn when to stop.
    """
    from trl.experimental.gold import GOLDConfig, GOLDTrainer
    from trl.experimental.utils import is_byte_level_tokenizer
    from trl.trainer.utils import RepeatSampler

    recipe, student = job.recipe, job.tokenizer.backend
    method = recipe.method
    assert isinstance(method, DistillOnPolicy) and recipe.teacher is not None
    say("GOLD: distillation across tokenizers is experimental, and its loss is an approximation")
    ends = sorted(end_tokens(student, fetch(recipe.model.ref, False)))
    prompts = Prompts(recipe, job.rows, student, tokenizer.backend, ends)

    class Prepared(GOLDTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            accumulation = self.args.gradient_accumulation_steps
            size = self.args.per_device_train_batch_size * accumulation * self.accelerator.num_processes
            return RepeatSampler(self.train_dataset, 1, size, accumulation, shuffle=False)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return super().compute_loss(model, prompts.for_teacher(inputs), return_outputs)

    common = common_arguments(job)
    settings = {
        "use_uld_loss": True,
        "uld_use_hybrid_loss": bool(student.get_vocab().keys() & tokenizer.backend.get_vocab().keys()),
        "uld_token_merge_strategy": "bayesian",
        "use_extended_uld": all(is_byte_level_tokenizer(b.backend_tokenizer) for b in (student, tokenizer.backend)),
        "uld_student_temperature": method.temperature,
        "uld_teacher_temperature": method.temperature,
        "uld_skip_student_eos": False,
        "uld_skip_teacher_eos": False,
        "disable_dropout": False,
    }
    config = GOLDConfig(
        **{**settings, **common},
        lmbda=1.0,  # all of it on the student's own answers
        beta=method.beta,
        max_completion_length=method.max_new_tokens,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        teacher_tokenizer_name_or_path=str(_tokenizer_folder(recipe)),
        **sampling(method),
        **_engine(method),
    )
    trainer = make_trainer(Prepared, job, config, _order(job), teacher_model=teacher, data_collator=prompts.batch)
    trainer.teacher_tokenizer.pad_token = tokenizer.backend.pad_token
    trainer.generation_config.eos_token_id = ends
    return trainer


def _tokenizer_folder(recipe: Recipe) -> Any:
    assert recipe.teacher is not None
    ref = parse_ref(recipe.teacher.tokenizer or recipe.teacher.model)
    path = ref.path
    return path if path is not None else fetch(ref, False, "teacher.tokenizer")


class Prompts:
    """Prepared prompts as GOLD's batches, and what the teacher reads in their place."""

    def __init__(self, recipe: Recipe, rows: Sequence[Row], student: Any, teacher: Any, ends: Sequence[int]) -> None:
        assert recipe.teacher is not None
        self.ids = [list(row["input_ids"]) for row in rows]
        self.pad = int(student.pad_token_id)
        self.ends = tuple(str(student.convert_ids_to_tokens(i)) for i in ends)
        self.texts: dict[tuple[int, ...], str] = {}
        begin = teacher.bos_token
        added = begin is not None and teacher("a")["input_ids"][:1] == [teacher.bos_token_id]
        for row, ids in zip(rows, self.ids, strict=True):
            text = mask_prompt(
                before_answer(row["messages"]),
                teacher,
                tools=row.get("tools"),
                template_kwargs=recipe.teacher.template_kwargs,
            ).text
            self.texts[tuple(ids)] = text.removeprefix(begin) if added else text  # GOLD's tokeniser puts it there

    def batch(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Left-padded prompts and their mask, both (batch, longest). There are no labels yet: answers follow."""
        listed = [self.ids[int(example["prompt"])] for example in examples]
        return dict(zip(("prompts", "prompt_attention_mask"), left_padded(listed, self.pad), strict=True))

    def for_teacher(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch with answers, whose texts are what the teacher is to read: its own prompt, the answer without end."""
        masks = inputs["prompt_attention_mask"].bool()
        keys = [tuple(ids[mask].tolist()) for ids, mask in zip(inputs["prompts"], masks, strict=True)]
        answers = inputs["original_completion_text"]
        for end in self.ends:
            answers = [answer.removesuffix(end) for answer in answers]
        return {
            **inputs,
            "original_prompt_text": [self.texts[key] for key in keys],
            "original_completion_text": answers,
        }


def left_padded(listed: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest), padding on the left."""
    width = max(map(len, listed))
    return (
        torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in listed]),
        torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in listed]),
    )


def longest_answers(trainer: Any, rows: Sequence[Row], method: DistillOnPolicy, count: int) -> dict[str, Any]:
    """A batch as the trainer's loss takes it: the longest prompts with answers of full length, for the pre-flight."""
    pad = int(trainer.processing_class.pad_token_id)
    longest = sorted((list(row["input_ids"]) for row in rows), key=len, reverse=True)[:count]
    longest += [longest[-1]] * (count - len(longest))
    answers = [(ids * (1 + method.max_new_tokens // len(ids)))[: method.max_new_tokens] for ids in longest]
    prompts, mask = left_padded(longest, pad)
    completions = torch.tensor(answers)
    written = torch.ones_like(completions)
    if not method.cross_tokenizer:
        return {
            "prompt_ids": prompts,
            "prompt_mask": mask,
            "completion_ids": completions,
            "completion_mask": written,
            "num_items_in_batch": torch.tensor(completions.numel()),
        }
    batch = {
        "prompts": prompts,
        "prompt_attention_mask": mask,
        "input_ids": torch.cat([prompts, completions], dim=1),
        "attention_mask": torch.cat([mask, written], dim=1),
        "labels": torch.cat([torch.full_like(prompts, -100), completions], dim=1),
        "original_completion_text": trainer.processing_class.batch_decode(answers, skip_special_tokens=False),
    }
    trainer._maybe_add_completion_byte_offsets(batch)
    return batch
