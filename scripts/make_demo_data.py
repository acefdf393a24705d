"""Write the demo task under data/processed/: support e-mails and the JSON a help desk wants from them.

    python scripts/make_demo_data.py [--output data/processed]

Every record is `{"instruction", "context", "response"}`; the response is compact JSON with the keys name, order,
product, issue in this order. The issue is one of six labels, the other three are copied from the e-mail. The test
split uses only e-mail layouts, surnames and a third of products that training never shows, so that it measures the task
and not memory; half of the validation split does, with layouts of its own. The same seed gives the same bytes on
every Python version: only `Random.random()` is used, whose sequence the language guarantees.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from ollatune.base.files import write_text

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "data" / "processed"
SEED = 20260101
NUM_RECORDS = {"train": 300, "validation": 24, "test": 60}
INSTRUCTION = "Extract name, order, product and issue from this e-mail as JSON."

TRAIN_LAYOUTS = (
    "Hello,\n\nmy order {order} is a problem: {issue}. It was the {product}.\n\nRegards,\n{name}",
    "Hi, {name} here. I bought the {product} (order {order}) and {issue}. Please help.",
    "Subject: {product}\n\nDear team, {issue}. Order number: {order}.\n{name}",
    "Name: {name}\nOrder: {order}\nProduct: {product}\nMessage: {issue}",
    "Order #{order} / {product} / {issue}.\n\nThanks, {name}",
    "I am writing about the {product} I ordered from you. {Issue}. The order is {order} and my name is {name}.",
    "{Issue}. What can you do? Product: {product}. Order: {order}. Sent by {name}",
    "Dear Sir or Madam,\nwith order no. {order} I bought one {product}. Sadly {issue}.\nKind regards\n{name}",
    "hey, it's {name}, {issue} :( it's about my new {product}, order id {order}",
    "From: {name}\nSubject: order {order}\n\nThe {product}: {issue}. Can you fix this?",
    "Phone note: {name} called. Order {order}, {product}. Customer says: {issue}.",
    "Why is it that {issue}? I paid for the {product} last week. See {order}.\n- {name}",
    "Good evening. {name} is my name, {order} my order. {Issue}, so I want to return the {product}.",
    "Re: Re: {order}\n\nStill no answer! As I said, {issue}. I need the {product} soon.\n{name}",
    "The {product} was a gift. {Issue}. Order {order}, under the name {name}.",
    "* customer: {name}\n* item: {product}\n* number: {order}\n* what happened: {issue}",
    "Hello support, {issue} (the {product}). Could you check #{order}? Best, {name}",
    "{name}, order {order}: {issue}. Please replace the {product}.",
    "To whom it may concern: on Friday I ordered the {product}. {Issue}. Signed, {name}. Reference: {order}",
    "Please help me. Order: {order}. I wanted the {product}, but {issue}. My name: {name}",
    "Can you check {order}? I gave the {product} to my sister, and {issue}. Thank you, {name}",
    "My name is {name} and I am angry. I bought the {product} and {issue}. The number is {order}.",
    "Does anyone read this? {Issue}. It is about the {product}. {order}, {name}",
    "Third message! The {product} (no. {order}): {issue}. {name}",
    "We bought the {product} for our office. {Issue}. Please look at {order}. {name}, manager",
    "Thank you for the quick answer. It is order {order}, the {product}, and {issue}. {name}",
    "{product}, {order}, {name}: {issue}!!",
    "Bought: {product}\nBy: {name}\nProblem: {issue}\nNumber: {order}",
)
"""Blanks: {name}, {order}, {product}, and the complaint as a clause ({issue}) or a sentence's start ({Issue})."""

VALIDATION_LAYOUTS = (
    "Complaint by {name}. Purchase {order}, one {product}. Reason: {issue}.",
    "Hi there,\n{issue}. I mean the {product} of order {order}.\nCheers\n{name}",
)

TEST_LAYOUTS = (
    "Good morning, could you look into {order} for me? The {product} is for my mother, but {issue}. Yours, {name}",
    "Is anybody there? My {product} again: {issue}. {name}, {order}",
    "I, {name}, am not happy. You sold me the {product} and now {issue}. You will find it under {order}.",
    "Web form\nWho: {name}\nWhich item: {product}\nPurchase no: {order}\nDetails: {issue}",
)

CLAUSES_BY_ISSUE = {
    "damaged": ("it arrived cracked", "it came with a big dent", "it was smashed on arrival"),
    "not delivered": ("it never arrived", "it was not delivered yet", "the delivery is late"),
    "wrong item": (
        "you sent the wrong colour",
        "you sent the wrong size",
        "you sent another product",
    ),
    "not working": (
        "it does not switch on",
        "it stopped working after a day",
        "it keeps turning itself off",
    ),
    "missing parts": (
        "a part is missing",
        "two screws are missing",
        "the manual was not in the box",
    ),
    "billing": (
        "I was charged twice",
        "the bill is too high",
        "there is a mistake in the bill",
    ),
}

FIRST_NAMES = (
    "Adam", "Ahmed", "Alice", "Amir", "Anna", "Ben", "Carla", "Chen", "Clara", "David", "Daniel", "Elena",
    "Emma", "Eric", "Frank", "Hassan", "George", "Grace", "Helen", "Hugo", "Ivan", "Jack", "James", "Julia",
    "Karen", "Kevin", "Laura", "Leila", "Lucas", "Maria", "Martha", "Michael", "Nina", "Noah", "Olga", "Omar",
    "Paula", "Peter", "Rachel", "Rosa", "Sam", "Sofia", "Steven", "Tom", "Thomas", "Vera", "Victor", "Yusuf",
)  # fmt: skip
TRAIN_SURNAMES = (
    "Adams", "Baker", "Bauer", "Brown", "Castro", "Cohen", "Costa", "Dubois", "Evans", "Fischer", "Garcia",
    "Gupta", "Hall", "Hansen", "Ito", "Jensen", "Kaya", "Khan", "Klein", "Kumar", "Lee", "Lopez", "Martin",
    "Meyer", "Moreau", "Murphy", "Nakamura", "Novak", "Okafor", "Olsen", "Park", "Patel", "Petrov", "Rossi",
    "Ruiz", "Sato", "Schmidt", "Silva", "Singh", "Taylor", "Weber", "Wong", "Yilmaz", "Young",
)  # fmt: skip
TEST_SURNAMES = (
    "Abebe", "Becker", "Bianchi", "Carter", "Demir", "Flores", "Jones", "Larsen", "Mensah", "Reyes", "Tanaka",
    "Wright",
)  # fmt: skip
TRAIN_PRODUCTS = (
    "desk lamp", "coffee grinder", "electric kettle", "rain jacket", "bike helmet", "garden hose", "phone case",
    "office chair", "wall clock", "water bottle", "yoga mat", "toaster", "blender", "backpack", "camping tent",
    "keyboard", "headphones", "vacuum cleaner", "picture frame", "baby monitor", "air pump", "hair dryer",
    "bread knife", "sleeping bag", "table fan", "radio", "rice cooker", "wool blanket",
)  # fmt: skip
TEST_PRODUCTS = (
    "bookshelf", "electric razor", "soup pot", "travel pillow", "computer mouse", "floor mirror", "tool box",
    "kitchen scale", "bird feeder", "alarm clock", "steam iron", "running shoes", "guitar stand", "door mat",
)  # fmt: skip


def build_record(
    rng: random.Random, layout: str, surnames: Sequence[str], products: Sequence[str]
) -> dict[str, str]:
    """One record with the fields drawn from the given lists."""
    issue = _pick(rng, tuple(CLAUSES_BY_ISSUE))
    clause = _pick(rng, CLAUSES_BY_ISSUE[issue])
    fields = {
        "name": f"{_pick(rng, FIRST_NAMES)} {_pick(rng, surnames)}",
        "order": _order_number(rng),
        "product": _pick(rng, products),
        "issue": issue,
    }
    blanks = fields | {"issue": clause, "Issue": clause[0].upper() + clause[1:]}
    return {
        "instruction": INSTRUCTION,
        "context": layout.format(**blanks),
        "response": json.dumps(fields, ensure_ascii=False),
    }


def build_splits() -> dict[str, list[dict[str, str]]]:
    """The three splits in file order; within a split layouts are evenly used and no e-mail occurs twice."""
    rng = random.Random(SEED)
    all_products = TRAIN_PRODUCTS + TEST_PRODUCTS
    seen = (TRAIN_LAYOUTS, TRAIN_SURNAMES, TRAIN_PRODUCTS)
    unseen_validation = (VALIDATION_LAYOUTS, TRAIN_SURNAMES, TRAIN_PRODUCTS)
    unseen_test = (TEST_LAYOUTS, TEST_SURNAMES, all_products)
    half = NUM_RECORDS["validation"] // 2
    return {
        "train": _build_split(rng, NUM_RECORDS["train"], *seen),
        "validation": _build_split(rng, half, *seen) + _build_split(rng, half, *unseen_validation),
        "test": _build_split(rng, NUM_RECORDS["test"], *unseen_test),
    }


def _build_split(
    rng: random.Random,
    num_records: int,
    layouts: Sequence[str],
    surnames: Sequence[str],
    products: Sequence[str],
) -> list[dict[str, str]]:
    drawn = [
        (rng.random(), build_record(rng, layouts[index % len(layouts)], surnames, products))
        for index in range(num_records)
    ]
    return [record for _, record in sorted(drawn, key=lambda pair: pair[0])]


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    return choices[int(rng.random() * len(choices))]


def _order_number(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"{10_000 + int(rng.random() * 90_000)}"
    letters = "".join(_pick(rng, "ABCDEFGHKLMNPRSTUVWXZ") for _ in range(2))
    return f"{letters}-{1_000 + int(rng.random() * 9_000)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    folder: Path = parser.parse_args().output
    for split, records in build_splits().items():
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
        print(f"{folder / f'{split}.jsonl'}: {len(records)} records")


if __name__ == "__main__":
    main()
