"""Extraction: finding facts in a text."""

import random
from collections.abc import Iterator

from data_prep.suite.rows import Row

_TEXTS = (
    "{name} works for {company} in {city}. Write to {email} or call {phone}.",
    "At {company} we are glad to welcome {name}, who comes to us from {city}: {phone}, {email}.",
    "{company}, {city}. Your contact is {name} ({email}, {phone}).",
    "Please call {phone} or write to {email}; {name} of {company} will answer from {city}.",
)


def contacts(rng: random.Random) -> Iterator[Row]:
    """Name, city and phone number of the person who works for a company, from a text about two people."""
    people = _people(rng)
    while True:
        two = [next(people), next(people)]
        if two[0]["company"] == two[1]["company"]:
            continue
        text = " ".join(template.format(**person) for template, person in zip(rng.sample(_TEXTS, 2), two, strict=True))
        wanted = rng.choice(two)
        question = f"{text}\nWho works for {wanted['company']}? Give name; city; phone number."
        yield Row(wanted["name"], question, f"{wanted['name']}; {wanted['city']}; {wanted['phone']}")


def _people(rng: random.Random) -> Iterator[dict[str, str]]:
    """Invented people with distinct names."""
    from faker import Faker

    fake = Faker("en_US", use_weighting=False)
    fake.seed_instance(rng.getrandbits(32))
    names: set[str] = set()
    while True:
        first, last = fake.first_name(), fake.last_name()
        person = {
            "name": f"{first} {last}",
            "company": fake.company(),
            "city": fake.city(),
            "email": f"{first.lower()}@{fake.free_email_domain()}",
            "phone": fake.numerify("555-01##"),  # reserved for fiction
        }
        if person["name"] not in names:
            names.add(person["name"])
            yield person
