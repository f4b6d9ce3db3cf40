"""From segments to ids and labels: labels survive, and only what may be cut is cut."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import AFTER, BEFORE, IMDB, ByteTokenizer, loaded, random_texts, rendered

from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.encoding import encode_rows
from llama.data.templates import END, TEMPLATES, Segment, Template

# Segments become ids


@pytest.mark.slow
def test_with_llama_2_the_answers_are_one_token_each_and_no_lone_space_comes_before(assets):
    """C13: ids 8178 and 6374 as the notebook has them, and never 29871, the trailing space of its prompt."""
    tokenizer = loaded(assets / "llama2-tokenizer")
    for text in random_texts(300):
        text = text.strip() + "x"
        for label, answer in ((0, 8178), (1, 6374)):
            ((ids, is_answer, _),) = encode_rows([rendered(text, label)], tokenizer, 10_000, "right")
            assert ids[-1] == answer and sum(is_answer) == 1
            assert ids[-2] != 29871
    for fixed in (BEFORE, AFTER):
        assert 29871 not in tokenizer.encode(fixed, starts_text=fixed == BEFORE)


def test_examples_do_not_depend_on_what_they_are_encoded_with(bundled):
    """A batch, a file, or alone: the same ids."""
    rows = [rendered(text, i % 2) for i, text in enumerate(random_texts(400)) if text.strip()]
    together = encode_rows(rows, bundled, 120, "left")
    assert together == [encode_rows([row], bundled, 120, "left")[0] for row in rows]
    order = random.Random(1).sample(range(len(rows)), len(rows))
    assert encode_rows([rows[i] for i in order], bundled, 120, "left") == [together[i] for i in order]


def test_control_segments_are_one_token_by_name_and_the_end_is_the_tokenizers_own(tokenizer):
    """C15, C18: the same name as text is spelled out instead; a control segment that comes first follows BOS."""
    name = next(token for token in ("</s>", "<|im_end|>", "<|eot_id|>") if tokenizer.has_control(token))
    control, text, end = Segment(name, answer=True, control=True), Segment(name), Segment(END, True, control=True)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    spelled = tokenizer.encode(name, starts_text=False)
    ((ids, labelled, _),) = encode_rows([[control, text, end]], tokenizer, 100, "right")
    assert ids == [*begin, tokenizer.control_id(name), *spelled, tokenizer.eos_id] and len(spelled) > 1
    assert labelled == [False] * len(begin) + [bool(begin)] + [False] * len(spelled) + [True]


def test_a_segment_that_begins_is_encoded_as_a_document_of_its_own(tokenizer):
    """C14: a BOS for each document, where the tokenizer has one, and for nothing else."""
    segments = [Segment("One", starts_text=True), Segment(" two", answer=True), Segment("One", starts_text=True),
                Segment("One", answer=True)]  # fmt: skip
    ((ids, _, _),) = encode_rows([segments], tokenizer, 100, "right")
    one, two, joined = tokenizer.encode("One"), *tokenizer.encode_batch([" two", "One"], starts_text=False)
    assert ids == [*one, *two, *one, *joined]
    assert tokenizer.bos_id is None or ids.count(tokenizer.bos_id) == 2


@pytest.mark.parametrize("source", ["[[{text}]]", "{text...}[[{text}]]", "[[{text=a,b}]]"])
def test_the_first_token_of_an_example_is_never_a_label(tokenizer, source):
    """C3: nothing comes before it that could predict it, also where the answer is the whole text."""
    template = Template("whole", source)
    for length in (2, 3, 5, 50):
        for text in ["a", "b"] if "=" in source else random_texts(20):
            segments = template.render({"text": text if text.strip() else "empty"}, "here")[0]
            (example,) = encode_rows([segments], tokenizer, length, "left")
            if example is None:  # a single token without BOS: then nothing is left to learn
                assert tokenizer.bos_id is None and not template.answers == ()
            else:
                assert not example.is_answer[0] and any(example.is_answer)
                assert len(example.ids) == len(example.is_answer) <= length


# Truncation


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [84, 90, 120, 500])
def test_truncation_takes_only_the_review_and_only_from_the_chosen_side(tokenizer, side, length):
    """C16, C17: what stays of the review is its beginning or its end, and every label is there."""
    fixed = [tokenizer.encode(BEFORE), tokenizer.encode(AFTER, starts_text=False)]
    texts = [text for text in random_texts(100, seed=2) if text.strip()]
    for label in (0, 1):
        answer = tokenizer.encode(IMDB.answers[label], starts_text=False)
        room = length - len(fixed[0]) - len(fixed[1]) - len(answer)
        rows = [rendered(text, label) for text in texts]
        for text, example in zip(texts, encode_rows(rows, tokenizer, length, side), strict=True):
            review = tokenizer.encode(text, starts_text=False)
            if room < 0:
                assert example is None
                continue
            kept = review[max(0, len(review) - room) :] if side == "left" else review[:room]
            ids, is_answer, was_cut = example
            assert ids == [*fixed[0], *kept, *fixed[1], *answer] and len(ids) <= length
            assert is_answer == [False] * (len(ids) - len(answer)) + [True] * len(answer)
            assert was_cut == (len(kept) < len(review))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_cut_before_a_free_answer_and_a_cut_answer_has_no_end(tokenizer, side):
    """C15, C16, C17: at every length, from all of it down to no label at all, which is no example."""
    row = {"instruction": "Say what you saw.", "input": "A quick film, naïve 映画 of great beauty",
           "output": "no plot and the worst I ever saw"}  # fmt: skip
    segments, answer = TEMPLATES["alpaca"].render(row, "here")
    before, after = tokenizer.encode(segments[0].text), tokenizer.encode("\n\n### Response:\n", starts_text=False)
    given, wanted = tokenizer.encode_batch([row["input"], row["output"]], starts_text=False)
    full = len(before) + len(given) + len(after) + len(wanted) + 1
    assert answer == -1
    for length in range(2, full + 2):
        (example,) = encode_rows([segments], tokenizer, length, side)
        room = length - len(before) - len(after) - len(wanted) - 1  # for the input
        kept = given if room >= len(given) else [] if room <= 0 else given[-room:] if side == "left" else given[:room]
        spoken = [*wanted, tokenizer.eos_id][: max(0, length - len(before) - len(after) - len(kept))]
        if not spoken:
            assert example is None
            continue
        assert example.ids == [*before, *kept, *after, *spoken] and len(example.ids) <= length
        assert example.is_answer == [False] * (len(example.ids) - len(spoken)) + [True] * len(spoken)
        assert example.was_cut == (length < full)
        assert (tokenizer.eos_id in example.ids) == (len(spoken) == len(wanted) + 1)


def test_a_conversation_is_cut_at_its_end_and_a_cut_turn_carries_no_end(tokenizer):
    """C15, C16: what is left ends with a label, and whole turns before keep the token that ends them."""
    turns = [("user", "Which film was it?"), ("assistant", "The worst ever."), ("user", "Why so?"),
             ("assistant", "No plot, no beauty.")]  # fmt: skip
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    for layout in ("llama2", "prompter"):
        segments, _ = Chat(layout).render(row, "here")
        ((ids, labelled, was_cut),) = encode_rows([segments], tokenizer, 1000, "right")
        assert not was_cut and ids.count(tokenizer.eos_id) == (4 if layout == "prompter" else 2)
        for length in range(2, len(ids)):
            (example,) = encode_rows([segments], tokenizer, length, "right")
            learned = [i for i in range(length) if labelled[i]]
            if not learned:
                assert example is None
            else:
                stop = learned[-1] + 1
                assert example == (ids[:stop], labelled[:stop], True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_begins_the_document_is_cut_after_its_beginning_of_text(bundled, side):
    """C14, C17: as in templates whose first segment may be cut."""
    segments = [Segment("one two three four five", may_cut=True), Segment(" done", answer=True)]
    first, last = bundled.encode("one two three four five"), bundled.encode(" done", starts_text=False)
    ((ids, _, _),) = encode_rows([segments], bundled, len(last) + 4, side)
    assert ids == [bundled.bos_id, *(first[-3:] if side == "left" else first[1:4]), *last]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_cut_alike_whatever_its_answer_and_also_without_one(side):
    """C13: were the room for a short answer given to the review, the length of a prompt would tell the answer."""
    fake, room, text = ByteTokenizer(), len(" negative"), "0123456789" * 3
    fixed = len(BEFORE) + 1 + len(AFTER)
    for length in range(fixed + room, fixed + room + len(text) + 2):
        rows = [rendered(text, 0), rendered(text, 1), rendered(text)[:-1]]
        negative, positive, none = encode_rows(rows, fake, length, side, answer_room=room)
        assert negative[0][:-9] == positive[0][:-1] == none[0] and len(negative[0]) <= length
        assert negative[2] == positive[2] == (length < fixed + room + len(text))
    assert encode_rows(rows, fake, fixed + room - 1, side, answer_room=room) == [None] * 3


@settings(derandomize=True, database=None, max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=30), side=st.sampled_from(["left", "right"]), length=st.integers(80, 130))
def test_any_text_is_rendered_and_fits(bundled, text, side, length):
    """C17, R16: whatever Unicode it is made of; or it is refused for being empty or no text."""
    if not text.strip() or re.search("[\0\ud800-\udfff]", text):
        with pytest.raises(UserError, match="^here: "):
            rendered(text)
        return
    (example,) = encode_rows([rendered(text, 0)], bundled, length, side)
    fixed = len(encode_rows([[s for s in rendered("x", 0) if not s.may_cut]], bundled, 1000, "right")[0][0])
    assert (example is None) == (fixed > length)
    if example:
        ids, is_answer, _ = example
        assert fixed <= len(ids) <= length and sum(is_answer) == 1 and is_answer[-1]
