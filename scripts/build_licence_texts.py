"""Write recipes/licenses/texts.json: sketches of licence texts, from a folder of texts.

    pip download scancode-toolkit==32.5.0 --no-deps && unzip scancode_toolkit-*.whl -d texts
    python -m scripts.build_licence_texts texts/licensedcode/data/licenses

The texts stay where they are; only hashes of their words are kept. Those under WORD_FOR_WORD are told word for word.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from recipes.texts import NOTICE, SKETCHES, sketch_of

# File stem in scancode-toolkit -> id of our facts, where the two differ or several texts share the facts.
TEXTS = {
    "llama-license-2023": "llama-1",
    "llama-2-license-2023": "llama-2",
    "llama-3.1-license-2024": "llama-3.1",
    "llama-3.2-license-2024": "llama-3.2",
    "llama-3.3-license-2024": "llama-3.3",
    "llama-4-license-2025": "llama-4",
    "gemma-tou-2024-04-01": "gemma-terms",
    "gemma-tou-2025-03-24": "gemma-terms",
    "deepseek-la-1.0": "deepseek-model-1.0",
    "bigscience-open-rail-m": "bigscience-openrail-m",
    "bigscience-open-rail-m2": "creativeml-openrail-m",
    "bigscience-rail-1.0": "bigscience-bloom-rail-1.0",
    "bigcode-open-rail-m-v1": "bigcode-openrail-m-1",
    "stable-diffusion-2022-08-22": "creativeml-openrail-m",
    "nvidia-open-model-2025-04-28": "nvidia-open-model-2025",
    "nvidia-model-training-2025": "nvidia-data-model-training-2025",
    "moonshot-ai-modified-mit-2025": "kimi-modified-mit",
    "tencent-hunyuan-3d-2.0-cla": "hunyuan-community-2025",
    "exaone-ai-model-1.1-nc": "exaone-1.1-nc",
    "hyperclova-x-seed-2025": "hyperclova-x-seed",
    "falcon-2-11b-1.0": "falcon-2-tii-1.0",
    "stability-ai-community-2024": "stability-community-2024",
    "flux-1-nc": "flux-1-dev-nc",
    "bilibili-model-ula-2025-09-09": "bilibili-model-2025",
    "chameleon-research-2024": "chameleon-research",
    "openai-tou-20241211": "openai-consumer",
    "openai-tou-20230314": "openai-consumer",
    "bsd-new": "bsd-3-clause",
    "bsd-simplified": "bsd-2-clause",
}
ALIKE = [
    "apache-2.0",
    "mit",
    "isc",
    "unlicense",
    "zlib",
    "openmdw-1.0",
    "openatom-model-1.0",
    "qwen-2024",
    "tongyi-qianwen-2023",
    "cc0-1.0",
    "cc-by-3.0",
    "cc-by-4.0",
    "cc-by-sa-3.0",
    "cc-by-sa-4.0",
    "cc-by-nc-3.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0",
    "cc-by-nc-nd-4.0",
    "cdla-permissive-1.0",
    "cdla-permissive-2.0",
    "cdla-sharing-1.0",
    "odbl-1.0",
    "odc-by-1.0",
    "pddl-1.0",
    "c-uda-1.0",
    "mpl-2.0",
    "gpl-3.0",
    "agpl-3.0",
    "lgpl-3.0",
    "artistic-2.0",
    "afl-3.0",
    "ecl-2.0",
    "ms-pl",
    "wtfpl-2.0",
]

# Licences that permit nearly all: what alters one of them must be seen. With the first and last words of what must
# stand in a text (empty: all of it), and the words in whose place others write a name.
WORD_FOR_WORD: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "apache-2.0": (
        ("TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION", "any such warranty or additional liability"),
        (),
    ),
    "mit": (("", ""), ("AUTHORS OR COPYRIGHT HOLDERS",)),
    "isc": (("", ""), ("AUTHOR",)),
    "bsd-new": (
        ("", ""),
        ("ORGANIZATION", "its contributors", "COPYRIGHT HOLDERS AND CONTRIBUTORS", "COPYRIGHT HOLDER OR CONTRIBUTORS"),
    ),
    "bsd-simplified": (("", ""), ("COPYRIGHT HOLDERS AND CONTRIBUTORS", "COPYRIGHT HOLDER OR CONTRIBUTORS")),
    "zlib": (("", ""), ()),
    "unlicense": (("", "dealings in the software"), ()),
    "cc0-1.0": (("Statement of Purpose", "this CC0 or use of the Work"), ()),
    "cc-by-3.0": (
        ("THE WORK (AS DEFINED BELOW) IS PROVIDED", "restrict the license of any rights under applicable law"),
        (),
    ),
    "cc-by-4.0": (("By exercising the Licensed Rights", "legal processes of any jurisdiction or authority"), ()),
    "cc-by-sa-4.0": (("By exercising the Licensed Rights", "legal processes of any jurisdiction or authority"), ()),
    "cdla-permissive-2.0": (("This is the Community Data License Agreement", ""), ()),
    "openmdw-1.0": (("By exercising rights granted", ""), ()),
    "odc-by-1.0": (("The Open Data Commons Attribution License is a license agreement", ""), ()),
}
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
APPLIED = re.compile(r"Licensed under the Apache License, Version 2\.0 \(the.*", re.DOTALL)  # the end of its appendix


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the sketches of licence texts.")
    parser.add_argument("folder", type=Path, help="folder with <key>.LICENSE files")
    folder = parser.parse_args().folder
    entries = []
    for stem, licence in sorted({**TEXTS, **{name: name for name in ALIKE}}.items()):
        text = (folder / f"{stem}.LICENSE").read_text("utf-8")
        core, names = WORD_FOR_WORD.get(stem, (None, ()))
        entries.append(sketch_of(licence, f"scancode-toolkit 32.5.0: {stem}", FRONT_MATTER.sub("", text), core, names))
        if stem == "apache-2.0" and (notice := APPLIED.search(text)) is not None:
            entries.append(sketch_of(licence, NOTICE, notice[0], ("", "")))
    SKETCHES.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n", "utf-8")
    print(f"{len(entries)} texts, {SKETCHES.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
