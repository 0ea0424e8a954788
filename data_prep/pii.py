"""Find personal data in texts and mask it with placeholders that stay the same within a row.

The rules prefer structure to guesses: a number counts when its check digits, its ranges or the words beside it say so.
Names need a model that the user picks (`load_ner`). No rule sees through spelled-out digits or "name at host dot com".
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes.errors import RecipeError

SHAPED = ("IBAN", "CREDIT_CARD", "CRYPTO", "US_SSN", "IP_ADDRESS", "EMAIL", "PHONE")
BESIDE_A_WORD = ("US_DRIVER_LICENSE", "PASSPORT", "TAX_ID", "DATE_OF_BIRTH")
ON_REQUEST = ("URL", "STREET_ADDRESS", "ZIP_CODE")  # seldom personal, and best effort
NAMES = ("PERSON", "LOCATION", "ORGANIZATION")  # no rule finds these
DEFAULT = SHAPED + BESIDE_A_WORD
ENTITIES = DEFAULT + ON_REQUEST + NAMES  # the earlier one wins where two are equally long
REGIONS = ("US", "GB", "DE")
_PLACEHOLDER = re.compile(rf"\[({'|'.join(ENTITIES)})_(\d{{1,9}})\]")


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` (exclusive) of a text, and what they are."""

    start: int
    end: int
    entity: str


Finder = Callable[[str], list[Span]]
Rule = Callable[[str], Iterator[tuple[int, int]]]


def find(text: str, entities: Collection[str] = DEFAULT, regions: Sequence[str] = REGIONS) -> list[Span]:
    """All personal data that the rules see, sorted and without overlaps.

    Of two findings that overlap the longer one names the entity (at equal length the one earlier in `ENTITIES`), and
    the span covers both, so that no character is left over. Phone numbers of `regions` (two-letter countries) may stand
    without a country code.

    Raises:
        RecipeError: an unknown entity, one that needs a model, or an unknown region.
    """
    if wrong := set(entities) - RULES.keys() - {"PHONE"}:
        remedy = "names need a model" if wrong & set(NAMES) else f"use some of {', '.join(ENTITIES)}"
        raise RecipeError(f"no rule finds '{min(wrong)}'", None, remedy)
    spans = [Span(*place, entity) for entity in entities if entity in RULES for place in RULES[entity](text)]
    if "PHONE" in entities:
        # Phone numbers look like any other number: what is already known to be something else is out of the question.
        rest = _replace(text, _settle(spans), lambda entity, value: "_" * len(value))
        spans += [Span(*place, "PHONE") for place in _phones(rest, regions)]
    return _settle(spans)


def _settle(spans: Sequence[Span]) -> list[Span]:
    kept: list[Span] = []
    for span in sorted(spans, key=lambda s: s.start):
        if kept and span.start < kept[-1].end:
            last = kept.pop()
            winner = min(last, span, key=lambda s: (s.start - s.end, ENTITIES.index(s.entity)))
            span = Span(last.start, max(last.end, span.end), winner.entity)
        kept.append(span)
    return kept


def _replace(text: str, spans: Sequence[Span], by: Callable[[str, str], str]) -> str:
    parts, end = [], 0
    for span in spans:
        parts += [text[end : span.start], by(span.entity, text[span.start : span.end])]
        end = span.end
    return "".join([*parts, text[end:]])


# Rules. A search that begins with a digit is several times faster than one that begins with a look-behind, so number
# patterns look behind after their first character. Repeats are bounded or cannot backtrack into one another: a megabyte
# of one character must not take longer than a megabyte of prose.


def _rule(pattern: str, check: Callable[[re.Match[str]], bool] = lambda match: True, gate: str = "") -> Rule:
    """A rule from a pattern. Its group `value`, if any, is what gets masked; without a `gate` in the text it rests."""
    rule, seen = re.compile(pattern), re.compile(gate)
    return lambda text: (m.span(m.lastgroup or 0) for m in rule.finditer(text if seen.search(text) else "") if check(m))


def _before(match: re.Match[str], words: re.Pattern[str], reach: int = 40) -> bool:
    return words.search(match.string[max(0, match.start() - reach) : match.start()]) is not None


_L = "A-Za-z0-9À-ɏ"  # Latin letters: Chinese writes no space between a sentence and an address
_HOST = rf"(?:[{_L}](?:[{_L}_-]{{0,61}}[{_L}])?\.){{1,8}}(?:[A-Za-z]{{2,24}}|xn--[a-z0-9-]{{2,59}})(?![.-]?[{_L}]|@)"
_MAIL = rf"(?<![{_L}_.+%-])[{_L}_][{_L}_.+%&'-]{{0,63}}(?<!\.)@{_HOST}"
_FILE = re.compile(r"(?i)\.(?:png|jpe?g|gif|svg|webp|ico|css|js)$")  # icon@2x.png
_PART = r"\([^\s()<>]{0,200}\)|[^\s()<>\[\]{}|\\^`\"\u3000-\u9fff\uff00-\uffef"
_REST = rf"(?:(?:{_PART}])*(?:{_PART}.,;:!?'*_]))"  # a bracket closes what it opened, a full stop ends the sentence
_SITE = r"(?:com|org|net|me|edu|gov|de|uk)/"
_URL = (
    rf"(?:[Hh][Tt][Tt][Pp][Ss]?|[Ff][Tt][Pp])://(?=\w){_REST}|[Ww]{{3}}\.{_HOST}(?:[:/?#]{_REST}?)?"
    # Without scheme only where a path follows: linkedin.com/in/name is a person, Amazon.com the name of a firm.
    rf"|(?<![\w.@/-])(?:[a-z0-9][a-z0-9-]{{0,62}}\.){{1,4}}{_SITE}{_REST}"
)

_QUAD = r"(?a)\d(?<![\w.-]\d)(?<![A-Za-z]/\d)\d{0,2}(?:\.\d{1,3}){3}(?![\w-]|\.\d)(?=(/\d|:\d\d)?)"
_V6 = r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{4,39}(?![\w:]|\.\w)"
_NO_ADDRESS = re.compile(r"(?i)(?:version|release|build|firmware|driver|section|clause|article|part|§|\bv)s?\.?\s?\Z")
_NETWORK = re.compile(r"(?i)(?<![a-z])(?:ips?|addr(?:ess)?|adresse|host|server|client|ping|gateway|dns|ssh)(?![a-z])")


def _is_ip(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if address.version == 4:
        # 12.3.4.5 may number a clause or a release: four small numbers need a word before, /24 or :80 after.
        named = max(address.packed) >= 32 or match[1] is not None or _before(match, _NETWORK)
        return named and address.packed[0] not in (0, 127) and not _before(match, _NO_ADDRESS, 20)
    groups = re.findall(r"\w+", match[0])  # `ab::cd` is also C++ and `1::2` also a slice
    return len(groups) > 2 or (len("".join(groups)) > 4 and re.search(r"\d", match[0]) is not None)


_CARD_WORD = re.compile(r"(?i)\b(?:cards?|cc|visa|mastercard|maestro|amex|debit|credit|kreditkarte|kartennummer)\b")
# Issuers (ISO/IEC 7812) whose numbers stand on their own; those of others also open parcel and article numbers.
_IIN = re.compile(r"4\d{15}(\d{3})?|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}|(?:6[0245]|35)\d{14}")


def _is_card(match: re.Match[str]) -> bool:
    value = re.sub(r"\D", "", match[0])
    digits = [int(digit) for digit in value]
    known = _IIN.fullmatch(value) is not None
    luhn = sum(digits[-1::-2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])  # ISO/IEC 7812-1, annex B
    return luhn % 10 == 0 and digits[0] in range(1, 7) and (known or _before(match, _CARD_WORD))


# Country and length (SWIFT IBAN registry).
_IBANS = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24 FI18
FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20
LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31
SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"""
_IBAN_LENGTH = {entry[:2]: int(entry[2:]) for entry in _IBANS.split()}
_IBAN = re.compile(r"(?a)\d(?<=[A-Za-z]{2}\d)(?<![^\W_][A-Za-z]{2}\d)\d([ -]?)[A-Za-z0-9](?:\1?[A-Za-z0-9]){10,28}")


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN.finditer(text):
        start = match.start() - 2
        length = _IBAN_LENGTH.get(text[start : start + 2].upper(), 99)
        ends = [m.end() for m in re.finditer(r"[A-Za-z0-9]", text[start : match.end()])]
        if length <= len(ends):
            end = start + ends[length - 1]  # words may follow after a space
            value = re.sub(r"[ -]", "", text[start:end])
            if int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1:  # ISO 13616
                yield start, end


_SSN_WORD = re.compile(r"(?i)\bssns?\b|social.security|\bsoc\.? ?sec")
# Areas 000, 666 and 900-999, group 00 and serial 0000 are never given out (SSA, POMS RM 10201.035).
_SSN = r"(?a)[0-8](?<![\w.-].)\d\d(?<!000)(?<!666)([- ]?)(?!00)\d\d\1(?!0000)\d{4}(?!\w|[.-]\d)"
_COIN = r"[13b0](?<!\w.)(?:(?<=[13])[1-9A-HJ-NP-Za-km-z]{25,34}|(?<=b)c1[ac-z02-9]{38,59}|(?<=0)x[\da-fA-F]{40})\b"


def _is_coin(match: re.Match[str]) -> bool:
    number = 0
    for char in match[0] if match[0][0] in "13" else "":
        number = number * 58 + "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz".index(char)
    raw = number.to_bytes(26, "big")
    return not number or hashlib.sha256(hashlib.sha256(raw[1:-4]).digest()).digest()[:4] == raw[-4:]  # Base58Check


# What has no shape of its own counts when a word stands right before it, with at most such links between.
_LINK = r"(?:[\s:#=(.–-]|(?:no|nr|num|number|nummer|id|is|was|ist|war|lautet|card|code|on|am|the|my)\b){0,12}"
_VALUE = r"(?P<value>(?:[A-Z]{1,5}(?=\d)|(?-i:[A-Z]{2} ))?\d(?:[A-Z\d]|[ ./-](?=\d)){3,18}(?: ?[A-D])?)(?!\w)"
_YEAR, _MONTH, _DAY = r"(?:19|20)\d\d", r"(?:0?[1-9]|1[0-2])", r"(?:0?[1-9]|[12]\d|3[01])"
_NUMBER_DATE = rf"{_YEAR}[-./]{_MONTH}[-./]{_DAY}|{_DAY}[-./]{_DAY}[-./]{_YEAR}"
_NAME = r"(?:jan|feb|mar|mär|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-zä]{0,6}\.?"
_DATE = rf"(?:{_NUMBER_DATE}|{_DAY}[-./]{_DAY}[-./]\d\d|{_DAY}(?:st|nd|rd|th|\.)?\s(?:of\s)?{_NAME},?\s{_YEAR}|"
_DATE += rf"{_NAME}\s{_DAY}(?:st|nd|rd|th)?,?\s{_YEAR})(?!\w|[.-]\d)"
_BORN = r"(?<![\w-])(?:born|dob|d\.o\.b|date of birth|birth ?da(?:te|y)|geb(?:oren|\.)|geburts(?:datum|tag))"
_TAX = r"tax(?:payer)?[ -]?(?:id|identification|number|no)|(?-i:I?TIN|EIN|UTR|NINO)|vat|national insurance|"
_TAX += r"ust-?id(?:-?nr)?|steuer-?(?:nr|nummer|id\w*)"


def _beside(words: str, least: int) -> Rule:
    def check(match: re.Match[str]) -> bool:
        return sum(map(str.isdigit, match["value"])) >= least and not re.search(_DATE, match["value"])

    return _rule(rf"(?i)\b(?:{words})\b\.?{_LINK}{_VALUE}", check)


_UNIT = r"(?i:\b(?:apt|apartment|suite|ste|flat)\.? ?#? ?\d{1,5}[A-Za-z]?\b)"
_US = "(?:[CGILMPVW]A|A[KLRZ]|C[OT]|D[CE]|FL|HI|I[DLN]|K[SY]|M[DEINOST]|N[CDEHJMVY]|O[HKR]|RI|S[CD]|T[NX]|[UV]T|W[IVY])"
_ZIP, _UK_CODE = r"\d{5}(?:-\d{4})?\b", r"\b[A-Z]{1,2}\d[A-Z\d]? \d[ABD-HJLNP-UW-Z]{2}\b"
_STREET = (
    r"\b\d{1,6}[A-Za-z]?,? (?:(?:[NSEW]\.?|[A-Z][\w'.-]{1,20}|\d{1,3}(?:st|nd|rd|th)) ){1,4}"
    r"(?:[Ss]treet|St|[Aa]venue|Ave|[Rr]oad|Rd|Boulevard|Blvd|[Ll]ane|Ln|[Dd]rive|Dr|Court|Ct|Place|Pl|Square|Sq|Way|"
    r"Terrace|Parkway|Pkwy|Circle|Crescent|Close|Highway|Hwy|Mews|Gardens|Grove|Row|Hill)\b\.?"
    r"|\b[A-ZÄÖÜ][\wß.-]{1,30}(?:stra(?:ß|ss)e|str\.|weg|platz|allee|gasse|damm) \d{1,4} ?[a-z]?\b"
    r"|\bP\.? ?O\.? Box \d{1,6}\b|\b(?:PSC|CMR|Unit) \d{1,5},? Box \d{1,6}\b|\b[ADF]PO,? A[AEP] \d{5}(?:-\d{4})?\b"
)
_TOWN = rf"(?:[A-Z][\w'.-]{{1,20}},? ?){{1,3}}\s?(?:{_US} {_ZIP}|{_UK_CODE})"
_TOWN += rf"|{_US} {_ZIP}|\d{{5}} [A-ZÄÖÜ][\wß-]+"
_BEFORE_ZIP = rf"(?:(?i:\b(?:zip(?: ?code)?|post(?:al)? ?code|plz|postleitzahl)\b{_LINK})"
_BEFORE_ZIP += rf"|\b[A-Z][\w.'-]{{1,30}},? {_US} (?={_ZIP}))"

RULES: dict[str, Rule] = {
    "IBAN": _ibans,
    "CREDIT_CARD": _rule(
        r"(?a)\d(?<![\w.-]\d)(?:\d{11,18}|\d{3}([ -])\d{4,6}(?:\1\d{1,6}){1,3})(?!\w|[.-]\d)", _is_card
    ),
    "CRYPTO": _rule(_COIN, _is_coin),
    "US_SSN": _rule(_SSN, lambda match: match[1] == "-" or _before(match, _SSN_WORD)),
    "IP_ADDRESS": _rule(f"{_QUAD}|{_V6}", _is_ip, r"\d\.\d{1,3}\.\d|:[0-9A-Fa-f]{0,4}:"),
    "EMAIL": _rule(_MAIL, lambda match: _FILE.search(match[0]) is None, "@"),
    "URL": _rule(_URL, gate=rf"://|[Ww]{{3}}\.|\.{_SITE}"),
    "US_DRIVER_LICENSE": _beside(r"driver'?s?'? licen[cs]e|driving licen[cs]e|d\.?l\.? (?:no|number|#)", 5),
    "PASSPORT": _beside(r"passport|reisepass(?:nummer)?|pass-?nr", 5),
    "TAX_ID": _beside(_TAX, 6),
    "DATE_OF_BIRTH": _rule(rf"(?i){_BORN}[^\d\n.!?;]{{0,40}}\s{{0,3}}(?P<value>{_DATE})"),
    "STREET_ADDRESS": _rule(rf"(?:{_STREET})(?:[,\s]{{1,3}}{_UNIT})?(?:[,\s]{{1,3}}(?:{_TOWN}))?|{_UNIT}"),
    "ZIP_CODE": _rule(rf"{_BEFORE_ZIP}(?P<value>\d{{3,6}}(?:[ -](?:\d{{2,4}}|[A-Z]{{2}}))?)(?![\w-])|{_UK_CODE}"),
}

_PHONE = re.compile(
    r"(?a)(?:\+|\((?=\+?\d{1,5}\))\+?)?\d(?<!\w\d)(?<![#$€£@%&/]\d)(?<!\d[.,]\d)(?<!\w-\d)"
    r"[\d ()./\u2010-\u2015\t-]{5,30}\d(?!\w(?<!x)|%|[.,]\d| ?[=+])"
)
_PHONE_WORD = re.compile(
    r"(?i)(?:\b(?:tel|phone|telephone|telefon|mobile|mobil|handy|fax|facsimile|hotline|whatsapp|voicemail|cell ?phone|"
    r"call|calling|dial|contact|rufen|(?:reach|text) \w+|(?:answer\w*|messages?) (?:at|on|to))\b|"
    r"\b(?:office|desk|direct|work|home|cell)(?: line| number)?\s?:|☎)\D{0,25}\Z"
)
_PHONE_WORD_AFTER = re.compile(r"(?i)[\s,(/\\-]{1,4}(?:office|mobile|cell|fax|home|work|desk|direct)\b")
_NO_PHONE = re.compile(
    r"(?i)\b(?:isbn|issn|doi|order|invoice|ref(?:erence)?|ticket|case|claim|policy|serial|part|sku|tracking|account|acct|"
    r"docket|version|model|id|patent|item|artikel|art|bestell\w*|rechnung\w*|kunden\w*|konto\w*)[\W_]{0,3}"
    r"(?:(?:no|nr|nummer|number|num|id|code)\b)?[\W_]{0,3}(?:is|was|ist)?[\W_]{0,3}\Z|[\d)]\s?[+*/=]\s?\Z"
)
_TIMES = re.compile(rf"\b(?:{_NUMBER_DATE}|{_YEAR} ?[-–/] ?{_YEAR})\b")
# Without a word: no bare digits, no lone digit save 1 (0-306-40615-2 is a book), and two long groups or a leading 0.
_LIKELY = re.compile(r"\+|(?!\d+\Z)(?!.*(?<!\d)[02-9](?!\d))(?:\(?0\d|.*\d{3}\D{1,2}\d{3})")
_DECIMAL = re.compile(r"\(?(?!\d{3}\.\d{4}\b)\d+\.\d+")


def _phones(text: str, regions: Sequence[str]) -> Iterator[tuple[int, int]]:
    from phonenumbers import SUPPORTED_REGIONS, Leniency, PhoneNumberMatcher

    if unknown := sorted(set(regions) - SUPPORTED_REGIONS):
        raise RecipeError(f"'{unknown[0]}' is no region of phone numbers", None, "use two capital letters, as in GB")
    for rough in _PHONE.finditer(text):
        # The library's matcher is slow: it sees only the neighbourhood of enough digits, without the dates in it.
        window = _TIMES.sub(lambda m: "_" * len(m[0]), text[rough.start() : rough.end() + 10])
        shape = _PHONE.match(window)
        digits = sum(map(str.isdigit, shape[0] if shape else ""))
        if not shape or digits < 7 or _DECIMAL.fullmatch(shape[0]) or _before(rough, _NO_PHONE):
            continue
        named = _before(rough, _PHONE_WORD, 60) or _PHONE_WORD_AFTER.match(text, rough.end()) is not None
        if not named and not _LIKELY.match(shape[0]):
            continue
        strict = Leniency.VALID if named else Leniency.STRICT_GROUPING
        found = {
            (number.start, number.end)
            for region, leniency in (*((region, strict) for region in regions), (None, Leniency.POSSIBLE))
            for number in PhoneNumberMatcher(window, region, leniency=leniency)
            if named or not number.raw_string.isdigit()
        }
        if named and not found and digits <= 15:
            found.add(shape.span())
        yield from ((rough.start() + start, rough.start() + end) for start, end in found)


# Why numbers, per row: a hash would name a value the same across rows, but there are fewer than 10^9 social security
# numbers, so whoever holds the data hashes them all and reads every one back. A number says nothing.
@dataclass
class Masker:
    """Masks the texts of one row; the same value gets the same placeholder in all of them.

    Placeholders that a text already holds stay, and their numbers are not given again. Entities of `NAMES` are found
    by `names`, a finder as `load_ner` makes it.
    """

    entities: Collection[str] = DEFAULT
    regions: Sequence[str] = REGIONS
    names: Finder | None = None
    _given: dict[tuple[str, str], str] = field(default_factory=dict, init=False)
    _last: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENTITIES, 0), init=False)

    @property
    def counts(self) -> Counter[str]:
        """Distinct values masked so far, by entity."""
        return Counter(entity for entity, _ in self._given)

    def mask(self, text: str) -> str:
        """The text with each value replaced by `[ENTITY_n]`; the rules find nothing more in it. Errors as of `find`."""
        held = list(_PLACEHOLDER.finditer(text))
        for entity, number in (match.groups() for match in held):
            self._last[entity] = max(self._last[entity], int(number))
        rules = set(self.entities) - set(NAMES) if self.names else self.entities
        spans = find(text, rules, self.regions)
        if self.names:
            named = [s for s in self.names(text) if s.entity in self.entities]
            free = [s for s in named if not any(s.start < h.end() and h.start() < s.end for h in held)]
            spans = _settle(spans + free)
        while spans:
            text = _replace(text, spans, self._placeholder)
            # What stands beside a value decides too, so a value that is gone can bring another to light.
            spans = find(text, rules, self.regions)
        return text

    def _placeholder(self, entity: str, value: str) -> str:
        exact = value if entity in ("URL", "CRYPTO") else value.casefold()
        letters = entity in (*NAMES, "EMAIL", "URL", "IP_ADDRESS", "STREET_ADDRESS")
        key = entity, " ".join(exact.split()) if letters else re.sub(r"[\W_]", "", exact)
        if key not in self._given:
            self._last[entity] += 1
            self._given[key] = f"[{entity}_{self._last[entity]}]"
        return self._given[key]


_KINDS = {"PER": "PERSON", "LOC": "LOCATION", "GPE": "LOCATION", "ORG": "ORGANIZATION"} | {name: name for name in NAMES}


def load_ner(folder: Path) -> Finder:
    """A finder of `NAMES` from a token-classification model; long texts are read in windows that overlap by a quarter.

    Raises:
        RecipeError: the folder holds no such model, or its labels name neither persons, places nor organisations.
    """
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForTokenClassification.from_pretrained(folder, use_safetensors=True)
        if not any(label.rpartition("-")[2].upper() in _KINDS for label in model.config.id2label.values()):
            raise ValueError("it has no label PER, LOC or ORG")
    except (OSError, ValueError) as error:
        raise RecipeError("is no model that finds names", str(folder), str(error).splitlines()[0]) from None
    size = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512)) - 10  # special tokens
    run = pipeline("token-classification", model, tokenizer=tokenizer, aggregation_strategy="simple")
    cut = {"truncation": True, "max_length": size, "stride": size // 4, "return_overflowing_tokens": True}

    def names(text: str) -> list[Span]:
        windows = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **cut)["offset_mapping"]
        starts = [(tokens[0][0], run(text[tokens[0][0] : tokens[-1][1]])) for tokens in windows if tokens]
        found = [(start, entry, entry["entity_group"].upper()) for start, entries in starts for entry in entries]
        return _settle([Span(n + e["start"], n + e["end"], _KINDS[kind]) for n, e, kind in found if kind in _KINDS])

    return names
