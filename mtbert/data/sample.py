"""A built-in sample of every task, made of generated sentences: synthetic, and called so wherever it shows.

It lets a first run train without any download. Sentences come from templates: sentiment from graded words,
contrast and negation; paraphrases from several ways to ask a question, against questions that share its topic
or its words; similarity from scenes that share some of their parts. Some words and wordings are kept for dev
and test, so that a score needs what the pretrained encoder knows and not only what training shows. The scores
say nothing about real data.

The sample is a function of the task's name: the same sentences everywhere and in every version of Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np

from mtbert.data.overlap import normalised
from mtbert.data.tables import Table, TableLayout, write_table
from mtbert.errors import DataError

Item = TypeVar("Item")
Example = tuple[tuple[str, ...], float]

SIZES: dict[str, dict[str, int]] = {
    "sst": {"train": 600, "dev": 200, "test": 100},
    "para": {"train": 600, "dev": 200, "test": 100},
    "sts": {"train": 600, "dev": 200, "test": 100},
    "cfimdb": {"train": 160, "dev": 60, "test": 40},
}
"""Examples of every task and split."""


def synthetic_tables(task: str) -> dict[str, Table]:
    """The sample of a task: labelled "train" and "dev", unlabelled "test", without a text in two of them.

    The `path` of a table is "synthetic:TASK-SPLIT", `lines` count its examples from 1.
    """
    if task not in SIZES:
        raise DataError(f"there is no synthetic sample for task {task}; expected one of {', '.join(SIZES)}")
    draw = _Draw(f"synthetic {task}")
    used: set[tuple[str, ...]] = set()
    tables = {}
    for split, size in SIZES[task].items():
        examples: list[Example] = []
        while len(examples) < size:
            texts, label = _GENERATORS[task](draw, split != "train", len(examples))
            if normalised(texts) not in used:
                used.add(normalised(texts))
                examples.append((texts, label))
        examples = draw.shuffled(examples)
        dtype = np.float64 if task == "sts" else np.int64
        tables[split] = Table(
            task=task,
            split=split,
            path=Path(f"synthetic:{task}-{split}"),
            ids=[f"synthetic-{task}-{split}-{number:04d}" for number in range(1, size + 1)],
            texts=[texts for texts, _ in examples],
            labels=None if split == "test" else np.array([label for _, label in examples], dtype=dtype),
            lines=list(range(1, size + 1)),
        )
    return tables


def write_sample(folder: Path | str, task: str, layout: TableLayout, files: Mapping[str, str]) -> None:
    """Writes the sample of a task to `folder`; `files` maps split to file name, as for `read_folder`."""
    for split, table in synthetic_tables(task).items():
        if split in files:
            write_table(Path(folder) / files[split], table, layout)


class _Draw:
    """Random choices that use nothing but `Random.random`, whose sequence Python guarantees."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def one(self, items: Sequence[Item]) -> Item:
        return items[int(self._random() * len(items))]

    def two(self, items: Sequence[Item]) -> tuple[Item, Item]:
        """Two different items."""
        first = int(self._random() * len(items))
        second = (first + 1 + int(self._random() * (len(items) - 1))) % len(items)
        return items[first], items[second]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        keys = [self._random() for _ in items]
        return [items[place] for place in sorted(range(len(items)), key=keys.__getitem__)]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _known(words: tuple[str, ...], held_out: bool) -> tuple[str, ...]:
    """Every fourth word is kept for dev and test."""
    return words if held_out else tuple(word for place, word in enumerate(words) if place % 4 != 3)


# Sentiment.

_ADJECTIVES: dict[int, tuple[str, ...]] = {
    -2: _words(
        "dreadful, atrocious, unbearable, abysmal, excruciating, worthless, appalling, disastrous, hideous, "
        "insufferable, horrendous, pathetic"
    ),
    -1: _words(
        "dull, weak, clumsy, tedious, flat, forgettable, predictable, uneven, contrived, sluggish, bland, "
        "disappointing"
    ),
    0: _words(
        "ordinary, average, acceptable, conventional, unremarkable, adequate, standard, passable, typical, "
        "moderate, routine, middling"
    ),
    1: _words(
        "charming, pleasant, clever, likeable, engaging, funny, touching, enjoyable, lively, graceful, "
        "entertaining, warm"
    ),
    2: _words(
        "masterful, breathtaking, brilliant, magnificent, unforgettable, stunning, exquisite, superb, "
        "extraordinary, flawless, dazzling, phenomenal"
    ),
}
_ASPECTS = _words(
    "the acting, the script, the direction, the soundtrack, the camera work, the dialogue, the ending, "
    "the plot, the main character, the pacing, the editing, the cast, the opening scene, the humour"
)
_FILMS = _words(
    "thriller, comedy, drama, documentary, western, sequel, romance, war film, biography, horror film, "
    "musical, road movie, heist film, fairy tale, satire, crime story"
)
_STRONGER = _words("utterly, truly, absolutely, incredibly")
_OPPOSITE_OF_MILD = ("far from {}", "anything but {}", "never {}")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _quality(draw: _Draw, value: int, held_out: bool) -> str:
    """An adjective phrase of the given sentiment."""
    if abs(value) == 2 and draw.chance(0.25):
        return f"{draw.one(_STRONGER)} {draw.one(_known(_ADJECTIVES[value // 2], held_out))}"
    if abs(value) == 1 and draw.chance(0.2):
        return draw.one(_OPPOSITE_OF_MILD).format(draw.one(_known(_ADJECTIVES[-value], held_out)))
    return draw.one(_known(_ADJECTIVES[value], held_out))


def _review_sentence(draw: _Draw, value: int, held_out: bool) -> str:
    film = draw.one(_FILMS)
    aspect, other = draw.two(_ASPECTS)
    first, second = _quality(draw, value, held_out), _quality(draw, value, held_out)
    if value == 0 and draw.chance(0.5):
        strength = draw.one((-1, 1))
        good, bad = _quality(draw, strength, held_out), _quality(draw, -strength, held_out)
        return draw.one(
            (
                f"{_capital(aspect)} of this {film} is {good}, but {other} is {bad}.",
                f"Although {aspect} is {good}, {other} of the {film} is {bad}.",
                f"One half of the {film} is {good}, the other half is {bad}.",
            )
        )
    return draw.one(
        (
            f"{_capital(aspect)} in this {film} is {first}.",
            f"{_capital(aspect)} is {first} and {other} is {second}.",
            f"I found this {film} {first}, and {aspect} is {second} too.",
            f"From beginning to end, the {film} is {first}.",
            f"As a {film} it is {first}; {aspect} is {second}.",
            f"My friends and I agreed that {aspect} of the {film} is {first}.",
        )
    )


def _sentiment(draw: _Draw, held_out: bool, number: int) -> Example:
    label = number % 5
    return (_review_sentence(draw, label - 2, held_out),), label


def _long_review(draw: _Draw, held_out: bool, number: int) -> Example:
    label = number % 2
    sign = 2 * label - 1
    sentences = []
    for _ in range(8 + draw.one(range(10))):
        value = draw.one((sign, sign, sign, 2 * sign, 2 * sign, 0, 0, -sign))
        sentences.append(_review_sentence(draw, value, held_out))
    return (" ".join(sentences).replace(". ", ".<br /><br />", 1),), label


# Paraphrase: ways to ask the same, by intent.

_INTENTS: tuple[tuple[str, ...], ...] = (
    (
        "How can I learn {}?",
        "What is the best way to learn {}?",
        "How should a beginner start with {}?",
        "I know nothing about {}. How do I get started?",
    ),
    (
        "How long does it take to get good at {}?",
        "How many months do I need to master {}?",
        "How much time must one spend to become skilled in {}?",
        "When will I be good at {} if I practise every day?",
    ),
    (
        "Is it worth the money to take a course in {}?",
        "Should I pay for lessons in {}?",
        "Are paid classes in {} a good investment?",
        "Do people regret spending money on {} lessons?",
    ),
    (
        "What are the best books about {}?",
        "Which books on {} would you recommend?",
        "What should I read to understand {}?",
        "Can anyone suggest some good reading on {}?",
    ),
    (
        "Can I make a living from {}?",
        "Is it possible to earn enough money with {}?",
        "How realistic is a career in {}?",
        "Do people who work in {} earn enough to live on?",
    ),
    (
        "Why do so many people give up {}?",
        "What makes people quit {}?",
        "What are the reasons that most people stop doing {}?",
        "Why does almost everybody abandon {} after a while?",
    ),
    (
        "Who is the most famous person in {}?",
        "Which person is best known for {}?",
        "Whose name does everybody know in the world of {}?",
        "Who is the biggest celebrity of {}?",
    ),
    (
        "Is {} harder than it looks?",
        "Is {} more difficult than people think?",
        "Do people underestimate how difficult {} is?",
        "How hard is {} really?",
    ),
)
_TOPICS = _words(
    "chess, photography, machine learning, classical guitar, French cooking, web design, jazz piano, "
    "astronomy, creative writing, carpentry, public speaking, digital marketing, yoga, graphic design, "
    "violin, pottery, Italian cooking, statistics, rock climbing, landscape painting, poker, "
    "portrait photography, organic chemistry, game programming, long distance running, figure drawing, "
    "philosophy, bee keeping, surfing, film editing"
)
_MIRRORED = (
    ("Why do {} dislike {}?", _words("cats, dogs, teachers, students, nurses, doctors, farmers, hunters")),
    ("How do I convert {} to {}?", _words("euros, dollars, pounds, litres, gallons, miles, kilometres")),
    ("Is it cheaper to move from {} to {}?", _words("Paris, London, Berlin, Madrid, Rome, Vienna, Oslo")),
    ("Why do {} earn more than {}?", _words("engineers, lawyers, actors, painters, pilots, bankers, cooks")),
)


def _paraphrase(draw: _Draw, held_out: bool, number: int) -> Example:
    kind = number % 20
    intent, other_intent = draw.two(_INTENTS)
    # Dev and test use the fourth wording of every intent and the last of every four topics as well.
    intent, other_intent = _known(intent, held_out), _known(other_intent, held_out)
    topic, other_topic = draw.two(_known(_TOPICS, held_out))
    if kind < 9:
        first, second = draw.two(intent)
        return (first.format(topic), second.format(topic)), 1
    if kind < 14:
        return (draw.one(intent).format(topic), draw.one(other_intent).format(topic)), 0
    if kind < 18:
        first, second = draw.two(intent)
        return (first.format(topic), (first if draw.chance(0.5) else second).format(other_topic)), 0
    question, names = draw.one(_MIRRORED)
    first, second = draw.two(names)
    return (question.format(first, second), question.format(second, first)), 0


# Similarity: scenes of four parts. The wordings of a part mean the same; the parts of a group are related.

_SUBJECTS = (
    (("A man", "A guy"), ("A boy", "A young lad"), ("An old man", "An elderly man")),
    (("A woman", "A lady"), ("A girl", "A young girl"), ("An old woman", "An elderly lady")),
    (("A dog", "A hound"), ("A puppy", "A little dog"), ("A cat", "A kitten")),
    (("Some people", "A group of people"), ("Two friends", "A pair of friends"), ("A crowd", "Many people")),
)
_ACTIONS = (
    (("ran", "sprinted"), ("walked", "strolled"), ("jumped", "leapt")),
    (("ate a meal", "had food"), ("drank water", "sipped water"), ("begged for food", "asked for food")),
    (
        ("played with a ball", "had fun with a ball"),
        ("kicked a ball", "hit a ball"),
        ("chased a toy", "ran after a toy"),
    ),
    (("slept", "took a nap"), ("rested", "relaxed"), ("sat down", "took a seat")),
    (
        ("looked at a car", "watched an automobile"),
        ("stared at a truck", "gazed at a lorry"),
        ("waited for a bus", "expected the bus"),
    ),
)
_PLACES = (
    (("in the park", "in a public garden"), ("on the grass", "on a lawn"), ("in a forest", "in the woods")),
    (("on the beach", "on the sand"), ("near a lake", "by the lake"), ("in the sea", "in the ocean")),
    (("in the street", "on the road"), ("in front of a shop", "outside a store"), ("in the city", "in town")),
    (
        ("in the kitchen", "in a kitchen"),
        ("in a living room", "in the lounge"),
        ("on a sofa", "on the couch"),
    ),
)
_TIMES = (
    (("in the morning", "early in the day"), ("at noon", "at midday"), ("in the afternoon", "after lunch")),
    (
        ("at night", "during the night"),
        ("in the evening", "after sunset"),
        ("in the dark", "without any light"),
    ),
)
_PARTS = ((_SUBJECTS, 0.3), (_ACTIONS, 0.4), (_PLACES, 0.2), (_TIMES, 0.1))


def _similarity(draw: _Draw, held_out: bool, number: int) -> Example:
    # How alike the pair is to be: 0 keeps no part, 5 keeps all of them.
    level = (0, 1, 1, 2, 2, 3, 3, 4, 5)[number % 9]
    first, second, score = [], [], 0.0
    for groups, weight in _PARTS:
        group, other_group = draw.two(groups)
        part, related = draw.two(group)
        a, b = draw.two(part) if held_out or draw.chance(0.5) else (part[0], part[0])
        roll = draw.one(range(5))
        if roll < level:
            likeness = 1.0
        elif roll == level:
            likeness, b = 0.5, draw.one(related)
        else:
            likeness, b = 0.0, draw.one(draw.one(other_group))
        first.append(a)
        second.append(b)
        score += weight * likeness
    return (" ".join(first) + ".", " ".join(second) + "."), round(5 * score, 1)


_GENERATORS: dict[str, Callable[[_Draw, bool, int], Example]] = {
    "sst": _sentiment,
    "cfimdb": _long_review,
    "para": _paraphrase,
    "sts": _similarity,
}
