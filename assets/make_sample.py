"""Write the bundled sample of movie reviews: assets/imdb_sample/train.jsonl and test.jsonl.

    python assets/make_sample.py

The reviews are ours, put together from the small grammar below; films and people are invented. They stand in
for IMDB where nothing has been downloaded. Rows are {"text": str, "label": 0 or 1}, 1 for positive.

No single word gives the label away: praise is denied nearly as often as it is given ("never convincing", "far
from dull"), and many reviews grant one opinion but decide by another ("the cast is wonderful, but the script
ruins everything"). A model has to read negation and contrast; a careful reader can always tell the verdict.
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent / "imdb_sample"
SEED = 2024
TRAIN_ROWS, TEST_ROWS = 6000, 1000

# How many reviews are of each kind, and how many opinions of an aspect and of the film are denials.
# Together they make every word nearly as frequent in negative as in positive reviews, yet leave it a slight
# lean: without one, training from scratch stays at chance for long. tests/test_sample.py holds the bounds.
KINDS = {"plain": 50, "contrast": 32, "mixed": 18}
ASPECT_DENIALS_SHARE, FILM_DENIALS_SHARE = 0.28, 0.38

# A pair holds what blames and what praises, so that the label is the index.
ADJECTIVES = [
    words.split()
    for words in (
        "dull clumsy tedious forgettable lifeless tiresome boring disappointing annoying bland messy shallow",
        "charming clever memorable inspired delightful engaging moving enjoyable brilliant wonderful "
        "magnificent convincing",
    )
]
ASPECTS = [
    "acting", "script", "music", "dialogue", "ending", "story", "direction", "cast", "opening", "humour",
    "romance", "villain", "pacing", "editing", "camera work", "final act", "lead performance", "set design",
]

# An assertion means what its adjective says, a denial means the opposite.
ASPECT_ASSERTIONS = [
    "{aspect} is {adjective}", "{aspect} feels {adjective}", "I found {aspect} {adjective}",
    "{aspect} turns out to be {adjective}", "{aspect} is {adjective} from start to finish",
]
ASPECT_DENIALS = [
    "{aspect} is never {adjective}", "{aspect} is far from {adjective}",
    "{aspect} is anything but {adjective}", "I did not find {aspect} {adjective}",
    "{aspect} does not feel {adjective} for a moment",
    "there is nothing {adjective} about {aspect}",
]
FIRST_ASSERTIONS = ["it is {adjective} at first", "the film starts out {adjective}"]
FIRST_DENIALS = ["it is not {adjective} at first", "at first the film is anything but {adjective}"]
FILM_ASSERTIONS = [
    "this is {a_adjective} film", "I found the film {adjective}", "the whole thing is {adjective}",
    "I expected something {adjective}, and that is what I got", "it ends up {adjective}",
]
FILM_DENIALS = [
    "this is not {a_adjective} film", "I did not find the film {adjective}",
    "there is not {a_adjective} minute in it", "the whole thing is anything but {adjective}",
    "I expected something {adjective}, and that is not what I got", "nobody could call the film {adjective}",
]
# Verdicts without an adjective, each as (assertion, denial).
VERDICTS = (
    [
        ("the film let me down", "the film never let me down"),
        ("the film wore me out", "the film never wore me out"),
        ("I was glad when it was over", "I was not glad when it was over"),
        ("I regret buying a ticket", "I do not regret buying a ticket"),
        ("{aspect} ruins everything", "not even {aspect} ruins the film"),
    ],
    [
        ("the film won me over", "the film never won me over"),
        ("the film is worth seeing", "the film is not worth seeing"),
        ("I would recommend it", "I would not recommend it"),
        ("I want to see it again", "I do not want to see it again"),
        ("{aspect} saves everything", "not even {aspect} saves the film"),
    ],
)

# The verdict decides, whichever comes first; the other opinion is only granted.
CONTRASTS = [
    "{granted}, but {verdict}.", "{granted}, yet {verdict}.", "{granted}. Still, {verdict}.",
    "{granted}; however, {verdict}.", "although {granted}, {verdict}.", "{verdict}, even though {granted}.",
    "{verdict}. Granted, {granted}.",
]
CLOSINGS = ["all in all, ", "overall, ", "all told, ", "on balance, ", "taken as a whole, "]

FIRST_NAMES = "Anna Boris Clara Dmitri Elena Felix Greta Hugo Ines Jonas Karla Leon Mira Nils Olga".split()
LAST_NAMES = "Abbot Brandt Castell Dorn Ekman Falk Grieg Holm Ivers Jansen Krug Lund Moss Norden".split()
TITLE_STARTS = "Silver Glass Paper Winter Hidden Crimson Northern Borrowed Midnight Wooden Distant".split()
TITLE_ENDS = "Harbour Garden Letter Train Orchard Mirror Bridge Lantern Island Clock Station Violin".split()
GENRES = "comedy,thriller,western,drama,musical,mystery,war film,horror film,road movie".split(",")
ROLES = "baker detective sailor teacher pianist doctor farmer lawyer pilot gardener".split()
PLOTS = [
    "inherits a farm", "loses a suitcase", "looks for a missing brother", "opens a hotel", "joins a circus",
    "finds an old map", "returns to a village by the sea", "takes the wrong train",
    "writes letters to a stranger",
]
COMPANY = ["my sister", "my brother", "an old friend", "my parents", "two colleagues", "a neighbour"]
TIMES = ["last night", "on a rainy Sunday", "at a small festival", "on a long flight", "at the local cinema"]
# Sentences without an opinion: how the film was seen, and what it tells.
SCREENINGS = [
    "I saw {film} {time}.", "I watched {film} with {company} {time}.", "{company} and I saw {film} {time}.",
]
SUMMARIES = [
    "this is a {genre} with {actor}.", "in this {genre}, {actor} plays a {role} who {plot}.",
    "the film tells of a {role} who {plot}.", "a {role} {plot}, and {actor} directed.",
]


def settings(rng):
    """Up to two sentences that say how the film was seen and what it is about."""
    words = {
        "film": f"The {rng.choice(TITLE_STARTS)} {rng.choice(TITLE_ENDS)}",
        "actor": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
        "genre": rng.choice(GENRES), "role": rng.choice(ROLES), "plot": rng.choice(PLOTS),
        "company": rng.choice(COMPANY), "time": rng.choice(TIMES),
    }
    sentences = [rng.choice(SCREENINGS).format(**words), rng.choice(SUMMARIES).format(**words)]
    return sentences[rng.randint(0, 2) :]


def opinion(rng, label, assertions, denials, share, aspect=""):
    """A clause that says `label`: it asserts an adjective of that side, or denies one of the other side."""
    deny = rng.random() < share
    adjective = rng.choice(ADJECTIVES[label ^ deny])
    article = "an" if adjective[0] in "aeiou" else "a"
    clause = rng.choice(denials if deny else assertions)
    return clause.format(aspect=f"the {aspect}", adjective=adjective, a_adjective=f"{article} {adjective}")


def aspect_opinion(rng, label, aspect):
    """An opinion of one aspect of the film: "the music is far from dull"."""
    return opinion(rng, label, ASPECT_ASSERTIONS, ASPECT_DENIALS, ASPECT_DENIALS_SHARE, aspect)


def verdict(rng, label, aspect):
    """An opinion of the whole film, with an adjective or without; it may name one aspect as the reason."""
    if rng.random() < 0.6:
        return opinion(rng, label, FILM_ASSERTIONS, FILM_DENIALS, FILM_DENIALS_SHARE)
    deny = rng.random() < FILM_DENIALS_SHARE
    return rng.choice(VERDICTS[label ^ deny])[deny].format(aspect=f"the {aspect}")


def review(rng, label):
    """One review of 1 to 6 sentences whose verdict is `label`."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    *aspects, reason = rng.sample(ASPECTS, 4)
    decision = verdict(rng, label, reason)
    if kind == "plain":  # every opinion agrees
        sentences = [aspect_opinion(rng, label, aspect) + "." for aspect in aspects[: rng.randint(0, 3)]]
        if not sentences or rng.random() < 0.5:
            sentences.append(decision + ".")
    elif kind == "contrast":  # one opinion of the other side is granted
        if rng.random() < 0.3:
            granted = opinion(rng, 1 - label, FIRST_ASSERTIONS, FIRST_DENIALS, ASPECT_DENIALS_SHARE)
        else:
            granted = aspect_opinion(rng, 1 - label, aspects[0])
        sentences = [rng.choice(CONTRASTS).format(granted=granted, verdict=decision)]
    else:  # opinions of both sides, then the verdict on the whole
        sides = rng.sample([0, 1], 2) + [rng.randint(0, 1)]
        sentences = [aspect_opinion(rng, *pair) + "." for pair in zip(sides, aspects, strict=True)]
        sentences.append(rng.choice(CLOSINGS) + decision + ".")
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in settings(rng) + sentences)


def make_sample():
    """{"train": rows, "test": rows}: labels exactly half and half, and no text twice."""
    rng = random.Random(SEED)
    seen = set()
    sample = {}
    for split, count in {"train": TRAIN_ROWS, "test": TEST_ROWS}.items():
        labels = [0, 1] * (count // 2)
        rng.shuffle(labels)
        sample[split] = []
        for label in labels:
            text = review(rng, label)
            while text in seen:  # a short review may come up again
                text = review(rng, label)
            seen.add(text)
            sample[split].append({"text": text, "label": label})
    return sample


def write_sample(folder=FOLDER):
    """Write train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in make_sample().items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_bytes(lines.encode())


if __name__ == "__main__":
    write_sample()
