"""Arithmetic word problems in GSM8K's format; the pairs of numbers of the test set never come in training.

python tests/benchmarks/word_problems.py --output FOLDER [--train 20000] [--test 500] [--largest 60]
"""

import argparse
import json
import random
from pathlib import Path

NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ivy",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Nick",
)
THINGS = ("apples", "books", "cards", "cookies", "marbles", "pencils", "shells", "stamps", "stickers", "toys")
ADD = (
    "{n} has {a} {t}. {m} gives {n} {b} more {t}. How many {t} does {n} have now?",
    "{n} bought {a} {t} on Monday and {b} {t} on Tuesday. How many {t} did {n} buy altogether?",
    "There are {a} {t} in a box. {n} puts {b} more {t} into it. How many {t} are in the box?",
)
SUBTRACT = (
    "{n} has {a} {t}. {n} gives {b} {t} to {m}. How many {t} does {n} have left?",
    "A shop has {a} {t} and sells {b} of them. How many {t} are left in the shop?",
    "{n} collected {a} {t} and {m} collected {b} {t}. How many more {t} did {n} collect than {m}?",
)
BOTH = (
    "{n} has {a} {t} and buys {b} more. Then {n} gives {c} {t} to {m}. How many {t} does {n} have left?",
    "{n} found {a} {t} and {m} found {b} {t}. They lost {c} {t} together. How many {t} do they have in the end?",
)


def held_out(a, b):
    """A fifth of all pairs, spread over the table."""
    return (7 * a + 3 * b) % 5 == 0


def problem(rng, largest, test):
    """One question with its worked answer."""
    while True:
        a, b = rng.randint(2, largest), rng.randint(2, largest)
        if held_out(a, b) == test:
            break
    n, m = rng.sample(NAMES, 2)
    words = {"n": n, "m": m, "t": rng.choice(THINGS)}
    kind = rng.choice(("add", "subtract", "both"))
    if kind == "subtract":
        a, b = max(a, b), min(a, b)
        if held_out(a, b) != test or a == b:
            return problem(rng, largest, test)
        question = rng.choice(SUBTRACT).format(a=a, b=b, **words)
        return question, f"{a}-{b}=<<{a}-{b}={a - b}>>{a - b} {words['t']}.\n#### {a - b}"
    total = a + b
    first = f"{a}+{b}=<<{a}+{b}={total}>>{total} {words['t']}."
    if kind == "add":
        return rng.choice(ADD).format(a=a, b=b, **words), f"{first}\n#### {total}"
    c = rng.randint(2, min(9, total - 1))
    left = total - c
    question = rng.choice(BOTH).format(a=a, b=b, c=c, **words)
    return question, f"{first}\n{total}-{c}=<<{total}-{c}={left}>>{left} {words['t']}.\n#### {left}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--largest", type=int, default=60)
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", options.train), ("test", options.test)):
        rng = random.Random(f"{split} 0")
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(count):
                question, answer = problem(rng, options.largest, split == "test")
                file.write(json.dumps({"question": question, "answer": answer}) + "\n")


if __name__ == "__main__":
    main()
