"""Names of models and services, compared: how a name is written, which family or host it belongs to, what it mimics."""

from __future__ import annotations

import re
import unicodedata
from fnmatch import fnmatchcase

from recipes.facts import Family, Host, facts

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"(?P<repo>[^/\s@:]+/[^/\s@:]+)(?:@(?P<revision>\S+))?")
# What makers add to the name of a family for one of its releases: sizes, dates, versions, stages. All else is a name of
# its own, which may be under terms of its own: `gemma-4-medical-27b`, `Kimi-K2-NC`.
_MARK = (
    r"(?:[ae]?\d+(?:\.\d+)*(?:x\d+)?[bmkte]?(?:-a\d+(?:\.\d+)?[bm])?|v\d+(?:\.\d+)*|h|nano|micro|tiny|mini|small|medium|"
    r"large|super|ultra|base|pt|sft|dpo|rlvr|instruct|it|chat|think|thinking|reasoning|instant|preview|captioner|lab|"
    r"code|text|vision|hf|nvidia)"
)
RELEASE = rf"(?:-?{_MARK}(?:-{_MARK})*)?-?"
QUANTISED = re.compile(
    r"[-_.](?:i1-)?(?:gguf|ggml|awq|gptq|exl[23]|hqq|mlx|dwq|fp8(?:-dynamic)?|nvfp4|mxfp4|fp4|nf4|bf16|f[pb]?(?:16|32)|"
    r"int[48]|[2-68]-?bits?|bnb-4bit|unsloth|quantized|w\d+a\d+|imatrix|i?q\d(?:_\w+)*|auto-?round|onnx|ov)(?=$|[-_.])",
    re.IGNORECASE,
)
HUB = ("https://huggingface.co/", "http://huggingface.co/", "https://www.huggingface.co/", "https://hf.co/", "hf.co/")


def normalised(name: str) -> str:
    """A name with widths and spaces made alike and the hub's address taken off: `org/name[@revision]` where it is an
    id."""
    plain = unicodedata.normalize("NFKC", name).strip()
    plain = re.sub(r"\s*([/@:])\s*", r"\1", "".join(c for c in plain if unicodedata.category(c) != "Cf"))
    for prefix in (*HUB, "huggingface.co/", "datasets/"):
        plain = plain.removeprefix(prefix)
    return re.sub(r"/(?:tree|resolve|blob)/([^/]+).*$", r"@\1", plain).removesuffix("/")


def folded(name: str) -> str:
    """How a bare name is compared: `Claude 3_Opus` as claude-3-opus."""
    return re.sub(r"[\s_]+", "-", name.casefold().strip())


def host_named(prefix: str) -> Host | None:
    return next((h for h in facts().families.hosts if prefix.casefold().strip() in h.names), None)


def host_at(address: str) -> Host | None:
    """The service at a host name."""
    return next((h for h in facts().families.hosts if any(fnmatchcase(address.casefold(), p) for p in h.hosts)), None)


def serves(host: Host, name: str) -> bool:
    """Whether a model of this name belongs to the service wherever it is met."""
    return any(fnmatchcase(name.casefold(), pattern) for pattern in host.models)


def host_of_model(name: str) -> Host | None:
    """The service whose model a bare name is: gpt-4o, Claude 3 Opus; of an address (claude.ai) the service itself."""
    if "." in name and (host := host_named(name)) is not None:
        return host
    wanted = folded(name)
    return next((h for h in facts().families.hosts if serves(h, wanted) or serves(h, name)), None)


def family_called(name: str) -> Family | None:
    """The family whose models are called so, whoever uploaded this one: re-uploads, quantised or not."""
    candidates = dict.fromkeys((name, unquantised(name), unquantised(folded(name))))
    for family in facts().families.models:
        owner, _, pattern = family.id.casefold().partition("/")
        if pattern in {"*", ""}:
            continue
        for candidate in candidates:
            inner = candidate.casefold().removeprefix(f"{owner}_")  # acme_model: how some mirrors write acme/model
            if fnmatchcase(inner, pattern) or (pattern.endswith("-*") and inner == pattern[:-2]):
                return family
    return None


def is_release(name: str, family: Family) -> bool:
    """Whether a name that the family's pattern matches is that of a release, and not of something else of that name."""
    owner, _, pattern = family.id.casefold().partition("/")
    if "*" not in pattern:
        return True
    plain = unquantised(name).casefold().removeprefix(f"{owner}_")
    literal = [re.escape(part.removesuffix("-")) for part in pattern.split("*")]
    return re.fullmatch(RELEASE.join(literal), plain) is not None


def unquantised(name: str) -> str:
    """A name without the marks of quantisation at its end."""
    while (shorter := QUANTISED.sub("", name)) != name:
        name = shorter
    return name


def near_miss(organisation: str) -> str | None:
    """An organisation of the facts that this one can be mistaken for."""
    known = {f.id.partition("/")[0] for f in facts().families.models}
    known = {o for o in known if "*" not in o}
    if organisation.casefold() in {o.casefold() for o in known}:
        return None
    look = _look(organisation)
    return next((o for o in sorted(known) if _look(o) == look or _one_edit(_look(o), look)), None)


def _look(text: str) -> str:
    swapped = text.translate(str.maketrans("I1|0O5_", "llloos-"))
    return swapped.casefold().replace("rn", "m").replace("vv", "w")


def _one_edit(a: str, b: str) -> bool:
    """Whether two names of at least six letters differ by one letter, or by two neighbours swapped."""
    if min(len(a), len(b)) < 6 or abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = len(a) == len(b) and rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:]
    return swapped or rest_a[1:] == rest_b or rest_a == rest_b[1:] or rest_a[1:] == rest_b[1:]
