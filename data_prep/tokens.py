"""The tokenizer of a recipe: fetched, given a chat template and a padding token where it has none, and identified."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.errors import RecipeError
from recipes.lineage import canonical_json, sha256_json
from recipes.refs import Ref, parse_ref, path_of, require_model_folder
from recipes.schema import Model

PLAIN_TEMPLATE = Path(__file__).resolve().parent.parent / "recipes" / "templates" / "plain.jinja"
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_MODEL_FILES = [*_TOKENIZER_FILES, "*.safetensors", "*.md", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "*.py"]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that is ready to train with.

    Attributes:
        backend: the transformers tokenizer; it has a chat template, an end token and a padding token.
        notes: what was chosen because the tokenizer lacked it; printed, and kept in the manifest.
        fingerprint: hash over vocabulary, special tokens and template; part of the key of prepared data.
    """

    backend: Any
    notes: tuple[str, ...] = field(default=())
    fingerprint: str = ""


@lru_cache(maxsize=8)
def fetch(ref: Ref, weights: bool, place: str = "model.base") -> Path:
    """The folder of a model, downloaded from the hub first where it is a repository.

    Args:
        ref: what to fetch.
        weights: also the safetensors files, not only configuration and tokenizer.
        place: the recipe key to name in an error.

    Raises:
        RecipeError: not there, or the hub cannot be reached and the files are not in its cache.
    """
    if (folder := require_model_folder(ref, place)) is not None:
        return folder
    import huggingface_hub

    patterns = _MODEL_FILES if weights else _TOKENIZER_FILES
    try:
        return Path(huggingface_hub.snapshot_download(ref.name, revision=ref.revision, allow_patterns=patterns))
    except huggingface_hub.errors.GatedRepoError:
        remedy = f"accept its terms on {huggingface_hub.constants.ENDPOINT}/{ref.name}, then log in: hf auth login"
        raise RecipeError(f"{ref} is gated: its owner gives it to those who ask", place, remedy) from None
    except Exception as error:  # not found, offline, no such revision: all mean that it is not to be had
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        remedy = "check name, revision, access rights (huggingface-cli login) and network, or give a local folder"
        raise RecipeError(f"{ref} cannot be fetched: {reason}", place, remedy) from None


def load_tokenizer(model: Model) -> Tokenizer:
    """Load the tokenizer that a recipe names.

    A tokenizer without chat template gets Retort's plain one; one without padding token pads with another special
    token than the end token, since a run that masks padding by id would otherwise never learn to stop.

    Raises:
        RecipeError: it cannot be loaded, or has no end token.
    """
    from transformers import AutoTokenizer

    key = "model.tokenizer" if model.tokenizer else "model.base"
    ref = parse_ref(model.tokenizer) if model.tokenizer else model.ref
    folder = _tokenizer_folder(ref, key)
    try:
        backend = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code is not None)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(f"the tokenizer of {ref} cannot be loaded: {reason}", key) from None
    notes = []
    if model.chat_template is not None:
        backend.chat_template = _read_template(Path(model.chat_template))
    elif not backend.chat_template:
        backend.chat_template = PLAIN_TEMPLATE.read_text(encoding="utf-8")
        notes.append("the tokenizer has no chat template: the plain one (Question:/Answer:) is used")
    if backend.eos_token_id is None:
        raise RecipeError(f"the tokenizer of {ref} has no end token", key, "set eos_token in its tokenizer_config.json")
    if backend.pad_token_id is None:
        backend.pad_token = _padding_token(backend)
        notes.append(f"the tokenizer has no padding token: {backend.pad_token!r} is used")
    return Tokenizer(backend, tuple(notes), _fingerprint(backend))


def shared_tokenizer(model: Model) -> Tokenizer:
    """As `load_tokenizer`, once in a process while the files stay as they are. To be read, not to be changed."""
    ref = parse_ref(model.tokenizer) if model.tokenizer else model.ref
    folder = _tokenizer_folder(ref, "model.tokenizer" if model.tokenizer else "model.base")
    files = [path for pattern in _TOKENIZER_FILES for path in sorted(folder.glob(pattern))]
    files += [path_of(model.chat_template)] if model.chat_template is not None else []
    states = [(path.stat().st_mtime_ns, path.stat().st_size) for path in files if path.is_file()]
    key = sha256_json([model.model_dump(mode="json"), str(folder), states])
    if key not in _SHARED:
        _SHARED.clear()
        _SHARED[key] = load_tokenizer(model)
    return _SHARED[key]


_SHARED: dict[str, Tokenizer] = {}


def _tokenizer_folder(ref: Ref, key: str) -> Path:
    path = ref.path
    if path is not None and path.is_dir() and key == "model.tokenizer":
        return path  # a tokenizer of its own needs no weights beside it
    return fetch(ref, False, key)


def _read_template(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the chat template cannot be read ({error})", "model.chat_template") from None
    if "messages" not in text:
        raise RecipeError(f"{path} is no chat template: it never reads `messages`", "model.chat_template")
    return text


def _padding_token(backend: Any) -> str:
    vocabulary = backend.get_vocab()
    candidates = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", backend.unk_token, backend.bos_token)
    for token in candidates:
        if token and token in vocabulary and token != backend.eos_token:
            return str(token)
    return str(backend.eos_token)


def _fingerprint(backend: Any) -> str:
    fast = getattr(backend, "backend_tokenizer", None)
    vocabulary = fast.to_str() if fast is not None else canonical_json(backend.get_vocab())
    special = {k: str(v) for k, v in backend.special_tokens_map.items()}
    return sha256_json([vocabulary, special, backend.chat_template])
