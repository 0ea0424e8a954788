"""Languages are told apart, and every quality rule fails on the text it is meant for, with the measured number."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import quality
from data_prep.quality import DEFAULTS, faults, language
from recipes.errors import RecipeError

SENTENCES = {  # article 1 of the Universal Declaration of Human Rights
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "cs": "Všichni lidé se rodí svobodní a sobě rovní co do důstojnosti a práv.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.",
    "en": "All human beings are born free and equal in dignity and rights.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i praw.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e direitos.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "sv": "Alla människor är födda fria och lika i värde och rättigheter.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
}
PROSE = (
    "The river rises in the hills behind the town and runs for sixty miles before it meets the sea. "
    "In spring it floods the low meadows, which is why the farmers have built their houses on stone platforms.\n\n"
    "Visitors usually arrive by train. From the station they can walk to the market square, where a guide waits with "
    "maps and a short history of the bridge; most people spend an afternoon there and return before dark."
)
CHINESE = (
    "这条河发源于小镇后面的山丘，流经一百多公里后汇入大海。春天河水泛滥，淹没低洼的草地，因此农民把房子建在石台上。\n\n"
    "游客通常乘火车前来。他们可以从车站步行到集市广场，那里有导游带着地图等候，并讲述古桥的简短历史。"
)


def texts(path: Path, *keys: str) -> list[str]:
    with path.open(encoding="utf-8") as stream:
        return ["\n".join(json.loads(line)[key] for key in keys) for line in stream]


@pytest.mark.parametrize("code", SENTENCES)
def test_one_sentence_tells_its_language(code: str) -> None:
    found, share = language(SENTENCES[code])
    assert found == code and 0.9 < share <= 1.0


def test_languages_without_a_code_of_their_own_count_for_their_macrolanguage() -> None:
    code, share = language("我哋今日一齊去飲茶，佢話嗰間舖頭啲點心好好食，你想唔想嚟？")  # Cantonese
    assert code == "zh" and 0.9 < share <= 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Guten Tag, wie geht's?",
        "12 34 " * 99,
        "```python\nthe = of and that have with\n```\nOK",
        "https://example.com/" + "a" * 99,
    ],
)
def test_a_text_too_short_to_tell_is_undetermined(text: str) -> None:
    assert language(text) == ("und", 0.0)


def test_twenty_letters_are_enough() -> None:
    assert language("these are some words")[0] == "und"  # 17 letters
    assert language("these are some words now")[0] == "en"  # 20 letters


def test_code_and_addresses_do_not_count() -> None:
    code = "```\nfor the value in the list of the values: print the value and return with that\n```"
    assert language(f"Das ist die Antwort auf Ihre Frage.\n{code}\nhttps://example.com/the/of/and")[0] == "de"
    assert language(f"Das ist die Antwort auf Ihre Frage.\n{code[:-4]}")[0] == "de"  # the fence never closes


def test_only_the_beginning_is_read() -> None:
    english = "This is an English sentence about the weather of the day. " * 50
    assert language(english + SENTENCES["ru"] * 500) == language(english)


def test_the_library_s_own_identifier_may_be_narrowed_down() -> None:
    import py3langid

    py3langid.set_languages(["fr", "it"])
    try:
        assert language(SENTENCES["de"])[0] == "de"
    finally:
        py3langid.set_languages(None)


def test_real_english_and_chinese(realdata: Path) -> None:
    english = texts(realdata / "prep" / "cleaning" / "c4_demo.jsonl", "text")
    assert Counter(language(t)[0] for t in english) == {"en": 300}
    chinese = texts(realdata / "data" / "general" / "alpaca_zh_demo.jsonl", "instruction", "output")
    found = Counter(language(t)[0] for t in chinese)
    # The 16 are answers in English to questions in Chinese; the undetermined ones are shorter than 20 letters.
    assert found["zh"] >= 960 and found["en"] <= 20 and found["zh"] + found["en"] + found["und"] == 1000


def test_prose_has_no_faults() -> None:
    assert faults(PROSE, {**DEFAULTS, "min_stop_words": 2}) == []
    assert faults(CHINESE, DEFAULTS) == []


BROKEN = [
    ("min_words", "one two three", "3"),
    ("max_words", "word " * 100_001, "100001"),
    ("min_mean_word_length", "ab cd ef g", "1.75"),
    ("max_mean_word_length", "abcdefghijkl abcdefghijkl", "12.0"),
    ("max_symbol_ratio", "#a #b c d", "0.5"),
    ("max_symbol_ratio", "wait... what… no more", "0.5"),
    ("max_bullet_lines", "• a\n- b\n* c\n\n  ● d", "1.0"),
    ("max_ellipsis_lines", "one...\ntwo…\nthree\nfour", "0.5"),
    ("min_alphabetic_words", "a b 3 - 5", "0.4"),
    ("min_stop_words", "the cat saw the dog", "1"),
    ("max_duplicate_lines", "a\nb\na\n\na", "0.5"),
    ("max_duplicate_line_chars", "aaaa\nb\naaaa", "0.4444"),
    ("max_duplicate_paragraphs", "a\nb\n\nc\n \na\nb", "0.3333"),
    ("max_duplicate_paragraph_chars", "aaa\n\nbb\n\naaa", "0.375"),
    ("max_top_2gram", "a b x a b", "0.8"),
    ("max_top_2gram", "ha ha ha ha", "1.0"),  # overlapping ones count once
    ("max_top_3gram", "a b c x a b c yyyyy", "0.5"),
    ("max_top_4gram", "a b c d xx a b c d", "0.8"),
    ("max_duplicate_5gram", "a b c d e f a b c d e g", "0.4167"),  # the first time is no repetition
    ("max_duplicate_10gram", "a b c d e f g h i j x a b c d e f g h i j", "0.4762"),
    ("max_duplicate_5gram", "春天河水泛滥。春天河水泛滥。", "0.5"),
    ("max_top_2gram", "เกิดเกิด", "0.75"),  # the vowel above goes with its letter: three words of 1, 2 and 1 characters
]


@pytest.mark.parametrize(("rule", "text", "number"), BROKEN)
def test_a_rule_names_itself_and_the_measured_number(rule: str, text: str, number: str) -> None:
    limit = DEFAULTS[rule] or 2
    assert faults(text, {rule: limit}) == [f"{rule}: {number}, the limit is {limit:g}"]
    just_enough = float(number) + (0.0001 if rule.startswith("max_") else -0.0001)
    assert faults(text, {rule: just_enough}) == []


def test_only_the_rules_named_apply_and_every_default_has_a_broken_text() -> None:
    assert faults("", {}) == faults("#", {}) == []
    assert faults("", DEFAULTS) == ["min_words: 0, the limit is 50"]
    assert faults(" \n\n ", {**DEFAULTS, "min_words": 0}) == []
    gram = {rule for rule in DEFAULTS if rule.startswith("max_duplicate_") and rule.endswith("gram")}
    assert {rule for rule, _, _ in BROKEN} | gram == DEFAULTS.keys()


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(RecipeError, match="there is no quality rule 'min_wrods'; use some of min_words, max_words"):
        faults(PROSE, {"min_wrods": 3})


def test_word_length_does_not_count_where_a_word_is_a_character() -> None:
    limits = {"min_mean_word_length": 3.0, "max_mean_word_length": 10.0}
    assert faults(CHINESE, limits) == faults(SENTENCES["ja"], limits) == faults(SENTENCES["th"], limits) == []
    assert faults("a b c d e f 中", limits) == ["min_mean_word_length: 1.0, the limit is 3"]


def naive(words: list[str]) -> dict[str, float]:
    """The n-gram measures word by word, as the paper describes them."""
    values, length = {}, sum(map(len, words))
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(grams)
        most = max(counts.values(), default=0)
        chosen = [g for g, count in counts.items() if count == most] if most > 1 else []
        covers = [{i + k for i, g in enumerate(grams) if g == top for k in range(n)} for top in chosen]
        if n >= 5:
            covers = [{i + k for i, g in enumerate(grams) if g in grams[:i] for k in range(n)}]
        name = f"top_{n}gram" if n < 5 else f"duplicate_{n}gram"
        values[name] = max((sum(len(words[i]) for i in cover) for cover in covers), default=0) / length
    return values


@given(
    st.one_of(
        st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=1, max_size=40),
        st.lists(st.sampled_from("abcdefghijkl"), min_size=3, max_size=15).map(lambda w: w + w[1:] + w[:-1]),
    )
)
def test_ngram_shares_equal_the_naive_count(words: list[str]) -> None:
    assert quality._measure_ngrams(words) == pytest.approx(naive(words))


def test_real_pages(realdata: Path) -> None:
    pages = texts(realdata / "prep" / "cleaning" / "c4_demo.jsonl", "text")
    broken = [faults(page, DEFAULTS) for page in pages]
    rules = Counter(line.split(":")[0] for lines in broken for line in lines)
    assert sum(map(bool, broken)) == 37 and rules["min_words"] == 26 and rules["max_duplicate_5gram"] == 8
    assert all(faults(f"{page}\n\n{page}", {"max_duplicate_paragraphs": 0.3}) for page in pages)
