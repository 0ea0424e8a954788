"""Licence texts that permit nearly all are told word for word: what alters one makes it another licence."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_gate_evasions import MIT, asked, model

from recipes.texts import identify

HEAD = "MIT License\n\nCopyright (c) 2024 Acme, Inc.\n\n"


@pytest.fixture(scope="module")
def apache(realdata: Path) -> str:
    text = (realdata / "gate" / "licence_texts" / "apache-2.0.txt").read_text()
    return text.split("\n---\n", 1)[1]  # without what the collection says of it


ADDED = (
    "Additional term. If your turnover is above twenty million dollars per month, no rights of any kind are granted.",
    "10. You may not use the Work to make money, and you may not teach another language model with it.",
    "Text that the Work writes shall not be given to any other language model to learn from.",
    "Businesses above $1M a year must pay.",
    "Copyright 2026 Acme. No rights are granted to businesses.",
    "Not for teachers.",
)


@pytest.mark.parametrize("added", ADDED)
def test_no_sentence_may_be_added(apache: str, added: str) -> None:
    for licence, text in (("apache-2.0", apache), ("mit", MIT)):
        middle = text.index("\n", len(text) // 3)
        inside = f"{text[:middle]}\n\n{added}\n{text[middle:]}"
        for altered in (f"{text}\n\n{added}\n", f"{added}\n\n{text}", inside):
            found = identify(altered)
            assert found.licence is None and found.near == licence, altered[-200:]


@pytest.mark.parametrize(
    ("licence", "words", "others"),
    [
        ("apache-2.0", "hereby grants to You", "hereby does not grant to You"),
        ("apache-2.0", "a perpetual, worldwide,", "a 30-day, revocable,"),
        ("apache-2.0", "sublicense, and distribute the", "study the"),
        ("apache-2.0", "no-charge, royalty-free", "royalty-bearing"),
        ("mit", "publish, distribute, sublicense, and/or sell", "study"),
        ("mit", "deal in the Software", "look at the Software"),
        ("mit", "free of charge", "for a fee"),
        ("mit", "sublicense, ", ""),
    ],
)
def test_no_word_may_be_taken_out_or_changed(apache: str, licence: str, words: str, others: str) -> None:
    text = " ".join((apache if licence == "apache-2.0" else MIT).split())
    assert identify(text).licence == licence and words in text
    found = identify(text.replace(words, others, 1))
    assert found.licence is None and found.near == licence


def test_half_an_apache_is_none(apache: str) -> None:
    end = apache.index("5. Submission of Contributions")
    assert identify(apache[:end]).licence is None
    again = apache.index("6. Trademarks")
    assert identify(apache[:end] + apache[again:]).licence is None  # a paragraph less
    swapped = apache[:end] + apache[again:] + apache[end:again]
    assert identify(swapped).licence is None


@pytest.mark.parametrize(
    "text",
    [
        MIT,
        HEAD + MIT,
        f"The MIT License (MIT)\n\nCopyright © 2019-2024 The Acme Authors <a@acme.org>\nAll rights reserved.\n\n{MIT}",
        f"# httplib2 Software License\n\n{MIT}",
        " ".join(MIT.split()),
        MIT.replace(" ", "\n"),
        f"> {MIT}".replace("sublicense", "sub-license").replace('"', "&quot;"),
        MIT.replace("AUTHORS OR COPYRIGHT HOLDERS", "ACME CONSORTIUM"),
    ],
)
def test_titles_holders_and_layout_change_nothing(text: str) -> None:
    assert identify(text).licence == "mit"


def test_an_apache_may_lack_its_appendix_or_have_it_filled_in(apache: str) -> None:
    appendix = apache.index("APPENDIX")
    short = apache[:appendix]
    filled = apache.replace("[yyyy] [name of copyright owner]", "2024 Alibaba Cloud")
    for text in (
        short,
        short.replace("END OF TERMS AND CONDITIONS", ""),
        filled,
        f"Copyright 2018- The Acme team.\n{apache}",
    ):
        assert identify(text).licence == "apache-2.0"
    assert identify(apache.replace("boilerplate notice", "fee")).licence is None


def test_the_notice_alone_stands_for_apache(apache: str) -> None:
    notice = apache[apache.index('Licensed under the Apache License, Version 2.0 (the "License")') :]
    held = f"Copyright 2024 Acme, Inc.\n\n{notice}"
    for text in (notice, held, f"{apache}\n\n{held}", apache[: apache.index("APPENDIX")] + held):
        assert identify(text).licence == "apache-2.0"
        for added in ADDED:
            for altered in (f"{text}\n\n{added}\n", f"{added}\n\n{text}", text.replace("AS IS", f"AS IS. {added}", 1)):
                assert identify(altered).licence is None, altered[-300:]
    assert identify(f"{MIT}\n\n{held}").licence == "mit"


def test_an_altered_text_beside_a_card_blocks(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "license: mit")
    (folder / "LICENSE").write_text(HEAD + MIT)
    assert asked(folder, "base").verdict == "allow"
    (folder / "LICENSE").write_text(HEAD + MIT.replace("and/or sell", "and not sell"))
    assert asked(folder, "base").verdict == "block"
