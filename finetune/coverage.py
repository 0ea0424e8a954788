"""Which weights of a model train, which do not, and why: judged by what the modules are, not by the recipe's word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_prep.tokens import fetch
from finetune.models import adapter_config, model_class
from recipes.errors import RecipeError
from recipes.schema import Adapter, Recipe

# Several projections in one Linear, under a name of its own: a list of the usual targets passes them by.
FUSED = {"qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "Wqkv", "W_pack"}
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_WRAPPED = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|original_module|lora_dropout)\b"
)
WHY = {
    "embedding": "embedding; name it in adapter.modules_to_save to train it",
    "normalisation": "normalisation; LoRA adapts linear layers",
    "convolution": "convolution; LoRA adapts linear layers",
    "vector": "no matrix; LoRA adapts linear layers",
    "matrix": "no linear layer; name it in adapter.target_parameters to train it",
    "head": "output head; left out by all-linear",
    "linear": "not among adapter.targets",
}


@dataclass(frozen=True)
class Weight:
    """What may train by itself: a module, or a matrix that a module holds without being a linear layer.

    Attributes:
        name: in the base model; of a bare matrix with the name of the parameter.
        kind: the type that it is counted under.
        nature: a key of WHY.
        expert: it belongs to the experts of a mixture, and is no router.
    """

    name: str
    kind: str
    nature: str
    expert: bool
    trains: bool

    def is_called(self, target: str) -> bool:
        """Whether a name of the recipe means it, as peft compares them."""
        return any(name == target or name.endswith(f".{target}") for name in (self.name, f"{self.name}.weight"))

    @property
    def short(self) -> str:
        """Enough of the name to tell it from others of its model, without the number of the layer."""
        parts = self.name.split(".")
        return ".".join(part for part in parts[-3 if parts[-1] == "weight" else -2 :] if not part.isdigit())


def coverage(model: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """Per type of weight: how many there are, how many train, and why the others do not.

    Raises:
        RecipeError: nothing trains; a target matches nothing; a linear layer that a target means, or an expert, is left
            out.
    """
    found = list(weights_of(model))
    kinds: dict[str, list[Weight]] = {}
    for weight in found:
        kinds.setdefault(weight.kind, []).append(weight)
    rows = []
    for kind, weights in kinds.items():
        adapted = sum(weight.trains for weight in weights)
        why = next((_why(weight, recipe) for weight in weights if not weight.trains), "")
        rows.append({"type": kind, "total": len(weights), "adapted": adapted, "why": why})
    _refuse_gaps(model, found, recipe)
    return sorted(rows, key=lambda row: (-row["adapted"], row["type"]))


def frozen(rows: Sequence[dict[str, Any]]) -> str:
    """What does not train, by the reason, in one line."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["adapted"] < row["total"]:
            left = f" {row['total'] - row['adapted']}/{row['total']}" if row["adapted"] else ""
            reasons.setdefault(row["why"].partition(";")[0], []).append(f"{row['type']}{left}")
    return "; ".join(f"{', '.join(types)} ({why})" for why, types in reasons.items()) or "nothing"


def skeleton(recipe: Recipe) -> Any:
    """The model with the recipe's adapter, as shapes without weights (torch's meta device): made in a moment.

    None where there is no such thing: the adapter is that of an earlier run, or the model's code needs numbers.

    Raises:
        RecipeError: a target that matches nothing.
    """
    from peft import get_peft_model
    from transformers import AutoConfig

    if recipe.model.run is not None and not recipe.model.merge:
        return None
    code = recipe.model.trust_remote_code is not None
    more = {"num_labels": 1} if recipe.method.type == "reward" else {}
    try:
        config = AutoConfig.from_pretrained(fetch(recipe.model.ref, True), trust_remote_code=code, **more)
        with torch.device("meta"):
            model = model_class(recipe).from_config(config, trust_remote_code=code)
    except Exception:  # whatever it is, it is told when the model is loaded
        return None
    if recipe.adapter is None:
        return model
    plain = recipe.adapter.model_copy(update={"init": "default", "dora": False})  # the others compute with weights
    try:
        with torch.device("meta"):
            return get_peft_model(model, adapter_config(recipe.model_copy(update={"adapter": plain})))
    except ValueError as error:
        raise RecipeError(f"cannot be set up: {' '.join(str(error).split())[:300]}", "adapter") from None


def sizes(model: Any) -> tuple[int, int]:
    """Parameters in all (4-bit weights counted as the weights they stand for) and those that train."""
    total = trainable = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            count = int(torch.Size(state.shape).numel())
        total += count
        trainable += parameter.numel() if parameter.requires_grad else 0
    return total, trainable


def weights_of(model: Any) -> Iterator[Weight]:
    """The weights of a model, with or without an adapter, in its order."""
    head = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_output_embeddings()
    for name, module in model.named_modules():
        clean = _clean(name)
        if clean is None:
            continue
        inner, adapted = _unwrapped(module)
        own = dict(inner.named_parameters(recurse=False))
        if not own:
            continue
        trains = bool(adapted) or any(parameter.requires_grad for parameter in own.values())
        nature = "head" if head is not None and inner is _unwrapped(head)[0] else _nature(inner, own)
        if nature != "matrix":
            yield Weight(clean, _kind(clean), nature, nature == "linear" and bool(_ONE_EXPERT.search(clean)), trains)
            continue
        for key, parameter in _matrices(own).items():
            expert = (parameter.dim() > 2 and parameter.shape[0] > 1) or bool(_EXPERTS.search(clean))
            kind = _kind(clean) if key == "weight" else f"{_kind(clean)}.{key}"
            yield Weight(f"{clean}.{key}", kind, nature, expert, key in adapted or parameter.requires_grad)


def _unwrapped(module: Any) -> tuple[Any, set[str]]:
    """The base model's module inside peft's wrappers, and which of its parameters wear an adapter."""
    adapted = set()
    while hasattr(module, "base_layer"):
        if len(getattr(module, "lora_A", ())) or len(getattr(module, "lora_embedding_A", ())):
            adapted.add(getattr(module, "parameter_name", "weight"))
        module = module.base_layer
    return module, adapted


def _nature(module: Any, own: dict[str, Any]) -> str:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, in spite of its name

    if isinstance(module, torch.nn.Linear | Conv1D):  # bitsandbytes' are torch's too
        return "linear"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "normalisation"
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return "convolution"
    return "matrix" if _matrices(own) else "vector"


def _matrices(own: dict[str, Any]) -> dict[str, Any]:
    return {name: parameter for name, parameter in own.items() if parameter.dim() > 1 and "bias" not in name}


def _clean(name: str) -> str | None:
    """The base model's name of a module inside peft's wrappers; None for the wrappers' own parts."""
    if _WRAPPED.search(name):
        return None
    name = re.sub(r"\.modules_to_save\.default$", "", name)
    return name.removeprefix("base_model.model.")


def _kind(name: str) -> str:
    *above, last = [part for part in name.split(".") if not part.isdigit()]
    if _EXPERTS.search(name) and last != "experts":
        return f"experts.{last}"
    return f"{above[-1]}.{last}" if above and "shared" in above[-1] else last


def _why(weight: Weight, recipe: Recipe) -> str:
    if recipe.adapter is None:
        return "frozen by the model's code"
    return WHY["linear"] if weight.nature == "head" and recipe.adapter.targets != "all-linear" else WHY[weight.nature]


def _refuse_gaps(model: Any, found: Sequence[Weight], recipe: Recipe) -> None:
    if not any(weight.trains for weight in found):
        raise RecipeError("no weight would train", "adapter.targets", "name linear modules of the model, or all-linear")
    if recipe.adapter is None:
        return
    _refuse_idle_names(model, found, recipe.adapter)
    listed = recipe.adapter.targets if isinstance(recipe.adapter.targets, tuple) else ()
    fused = {w.kind for w in found if w.nature == "linear" and w.kind in FUSED and not w.trains}
    if fused:
        names = ", ".join(sorted(fused))
        raise RecipeError(f"the fused projections {names} are not covered", "adapter.targets", "name them as targets")
    _refuse_missed_experts(found, listed)
    _refuse_missed_layers(found, listed, recipe.adapter, recipe.model.quantization)


def _refuse_idle_names(model: Any, found: Sequence[Weight], adapter: Adapter) -> None:
    """Every name that the recipe gives has to mean something that trains."""
    kinds = ", ".join(sorted({w.kind for w in found if w.nature != "normalisation"}))
    # peft gives some targets to the matrices that took the place of linear layers, and takes them off its list.
    kept = getattr(getattr(model, "peft_config", {}).get("default"), "target_modules", None) or ()
    for target in adapter.targets if isinstance(adapter.targets, tuple) else ():
        if target in kept and not any(w.trains and w.is_called(target) for w in found):
            raise RecipeError(f"target '{target}' adapts no module", "adapter.targets", f"the model has {kinds}")
    for target in adapter.target_parameters:
        if not any(w.trains and w.is_called(target) for w in found):
            place = "adapter.target_parameters"
            raise RecipeError(f"'{target}' adapts no weight", place, f"the model has {kinds}")
    missing = [name for name in adapter.modules_to_save if not any(w.trains and w.is_called(name) for w in found)]
    if missing:
        raise RecipeError(f"{missing} match no module", "adapter.modules_to_save", f"the model has {kinds}")


def _refuse_missed_experts(found: Sequence[Weight], listed: Sequence[str]) -> None:
    """The experts are most of a mixture: all-linear must reach each of their types, a list one at the least."""
    experts: dict[str, list[Weight]] = {}
    for weight in found:
        if weight.expert:
            experts.setdefault(weight.kind, []).append(weight)
    missed = {kind: ws for kind, ws in experts.items() if not any(w.trains for w in ws)}
    if not missed or (listed and len(missed) < len(experts)):
        return
    which = "of them" if len(missed) == len(experts) else f"of their {', '.join(sorted(missed))}"
    bare = any(ws[0].nature == "matrix" for ws in missed.values())
    key = "adapter.target_parameters" if bare else "adapter.targets"
    names = ", ".join(sorted({w.short if bare else w.short.split(".")[-1] for ws in missed.values() for w in ws}))
    raise RecipeError(
        f"the model has experts and the adapter covers none {which}",
        "adapter.targets",
        f"name their weights in {key}: [{names}]",
    )


def _refuse_missed_layers(found: Sequence[Weight], listed: Sequence[str], adapter: Adapter, quantization: str) -> None:
    """peft takes gate_proj and its like for the experts' where a model has both, and passes the other layers by."""
    missed = [
        w for w in found if w.nature == "linear" and not w.trains and (not listed or any(map(w.is_called, listed)))
    ]
    if not missed:
        return
    names = ", ".join(sorted({w.short for w in missed}))
    says = f"{', '.join(listed) or 'all-linear'} leaves out {len(missed)} linear layers ({names})"
    if quantization == "none":
        more = ", ".join(sorted({*adapter.target_parameters, *(f"{w.short}.weight" for w in missed)}))
        raise RecipeError(says, "adapter.targets", f"add adapter.target_parameters: [{more}]")
    reached = ", ".join(sorted({w.short.split(".")[-1] for w in found if w.nature == "linear" and w.trains}))
    experts = ", ".join(sorted({w.short for w in found if w.expert and w.nature == "matrix"}))
    remedy = f"do without them: adapter.targets: [{reached}], adapter.target_parameters: [{experts}]"
    raise RecipeError(f"{says}, whose 4-bit weights peft cannot adapt by name", "adapter.targets", remedy)
