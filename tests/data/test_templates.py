"""Text templates: what the language says, the prompts word for word, and what is asked, labelled and cut of a row."""

import json
import random
import re
import typing
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BUNDLED, REAL, ROOT, loaded

from llama.boundary.errors import UserError
from llama.data.encoding import Encoded, encode_rows
from llama.data.templates import END, TEMPLATES, Segment, Template
from llama.data.text_rows import LONGEST_LINE
from llama.data.tokenizer import Tokenizer

SEEDS = ROOT.parent / "shared" / "seeds"

HOSTILE = ["</s>", "<s>", "<unk>", "<0x0A>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>",
           "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "[INST]", "[/INST]", "<<SYS>>", "{text}", "{label}",
           "{0.__class__}", "{instruction}", "{output}", "{", "}", "{{", "}}", "{{}}", "[[", "]]", "[[{output}]]",
           "\n=====\n", "%s", "%(text)s", "\\x00", "${HOME}", "#### Answer:", "### Response:\n", " negative"]
WORDS = "a film of great beauty and no plot I don't recommend 10/10 <br /><br /> naïve 映画 🎬 e\u0301 worst".split()
SEPARATORS = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028", "\x85"]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts, none of them blank, with odd spaces, scripts, and whatever looks like markup or a template."""
    generator = random.Random(seed)
    pools = [[f"{word} " for word in WORDS], [*WORDS, *HOSTILE, *SEPARATORS], [*" \n\tae'.{}[]"], HOSTILE]
    texts = ("".join(generator.choices(generator.choice(pools), k=generator.randrange(1, 12)))
             for _ in range(2 * count))
    return [text for text in texts if text.strip()][:count]


def texts_of(template: Template, row: dict) -> list[str]:
    return [segment.text for segment in template.render(row, "here")[0]]


def refused(source: str, name: str = "my.txt") -> str:
    with pytest.raises(UserError) as error:
        Template(name, source)
    assert "\n" not in str(error.value)
    return str(error.value)


def misfit(template: Template, row: dict) -> str:
    with pytest.raises(UserError) as error:
        template.render(row, "data.jsonl:7")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


# The language


def test_a_template_is_its_text_with_fields_and_an_answer_with_its_end():
    """C15: the answer stands in a segment of its own, and so does the end token after it, both labels."""
    template = Template("my.txt", "Q: {question}\nA:[[ {answer}!]]\n")
    assert template.render({"question": "Why?", "answer": "So", "more": 1}, "here") == (
        [Segment("Q: Why?\nA:"), Segment(" So!", answer=True, may_cut=True), Segment(END, answer=True, control=True)],
        -1,
    )
    assert template.fields == {"question", "answer"} and template.answers == ()
    assert template.expected == "{question: str, answer: str}"


def test_a_field_that_may_be_cut_stands_apart_from_what_is_around_it():
    """C17: it alone may be shortened, also where it begins the text or touches another."""
    template = Template("my.txt", "{a...}{b...} and {c}; {d.1...}.\n[[{e}]]")
    row = {"a": "A", "b": "B", "c": "C", "d": ["no", "D"], "e": "E"}
    assert [(s.text, s.may_cut, s.answer) for s in template.render(row, "here")[0][:-1]] == [
        ("A", True, False), ("B", True, False), (" and C; ", False, False), ("D", True, False), (".\n", False, False),
        ("E", True, True),
    ]


@pytest.mark.parametrize("value, word, index", [
    (0, "bad", 0), (1, "good", 1), (2, "so so", 2), ("bad", "bad", 0), ("good", "good", 1), ("so so", "so so", 2),
])
def test_an_answer_of_a_few_words_is_chosen_by_number_or_by_the_word_itself(value, word, index):
    """C13: no end follows it, and it may not be cut."""
    template = Template("my.txt", "{text}[[: {label=bad,good,so so}.]]")
    assert template.render({"text": "T", "label": value}, "here") == (
        [Segment("T"), Segment(f": {word}.", answer=True)], index)
    assert template.answers == (": bad.", ": good.", ": so so.") and template.fields == {"text", "label"}
    assert template.expected == "{text: str, label: int or word}"


def test_an_element_of_a_list_is_taken_by_its_number():
    template = Template("my.txt", "{a.0} {a.2}[[{b.11}]]")
    assert texts_of(template, {"a": ["x", "", "z"], "b": ["no"] * 11 + ["yes"]})[:2] == ["x z", "yes"]
    assert template.expected == "{a: list of str, b: list of str}"


def test_doubled_braces_are_braces_and_single_brackets_are_brackets():
    template = Template("my.txt", '{{"a": "{a}", {{}}}} [1] ] [ {{{a}}} {{a}}\n[[{{{b}}} [x] {b}]]')
    assert texts_of(template, {"a": "A", "b": "B"})[:2] == ['{"a": "A", {}} [1] ] [ {A} {a}\n', "{B} [x] B"]


@pytest.mark.parametrize("source, first", [
    ("{a}\n[[{b}]]", "A\n"), ("{a}\n[[{b}]]\n", "A\n"), ("\n{a}\n\n[[{b}]]\n=====\n[[{b}]]\n", "\nA\n\n"),
    ("{a} \n[[{b}]]\n=====  \t\n[[{b}]]", "A \n"), ("=== {a}\n ===== ======\n[[{b}]]", "=== A\n ===== ======\n"),
])
def test_the_newline_that_ends_an_alternative_is_the_files_and_all_others_are_the_prompts(source, first):
    assert texts_of(Template("my.txt", source), {"a": "A", "b": "B"}) == [first, "B", END]


TWO_OF_THREE = "{a.1} {b...}\n[[{z}]]\n=====\n{b} only\n[[{z}]]\n=====\nnothing\n[[{z}]]\n"


@pytest.mark.parametrize("row, prompt", [
    ({"a": ["", "A"], "b": "B"}, "A B\n"), ({"a": ["x"], "b": "B"}, "B only\n"), ({"a": [], "b": "B"}, "B only\n"),
    ({"a": ["x", " \n"], "b": "B"}, "B only\n"), ({"a": ["x", None], "b": "B"}, "B only\n"),
    ({"a": None, "b": "B"}, "B only\n"), ({"b": "B"}, "B only\n"), ({"a": ["", "A"], "b": ""}, "nothing\n"),
    ({"a": ["", "A"], "b": "\t"}, "nothing\n"), ({"a": ["", "A"], "b": None}, "nothing\n"), ({}, "nothing\n"),
], ids=str)
def test_a_row_gets_the_first_alternative_of_which_it_fills_every_field(row, prompt):
    """What is missing, null, empty or blank fills none."""
    template = Template("my.txt", TWO_OF_THREE)
    assert "".join(texts_of(template, row | {"z": "Z"})) == prompt + "Z"
    assert template.fields == {"z"}
    assert template.expected == "{a: list of str or nothing, b: str or nothing, z: str}"


SYNTAX_ERRORS = {
    "an open brace": ("x\ny {a [[{b}]]", 2, "{ without its other half"),
    "a closing brace": ("x\n\n a} [[{b}]]", 3, "} without its other half"),
    "a brace at the very end": ("[[{b}{", 1, "{ without its other half"),
    "an answer closed only": ("{a}\n]] [[{b}]]", 2, "]] without its other half"),
    "an answer inside the answer": ("{a}\n[[x\n[[{b}]]]]", 3, "[[ without its other half"),
    "text after the answer": ("{a}\n[[{b}]]\nbye", 2, "found '\\nbye' after the answer"),
    "two answers": ("{a}\n[[{b}]] [[{b}]]", 2, "after the answer, expected the answer to end"),
    "two newlines after the answer": ("[[{b}]]\n\n", 1, "found '\\n' after the answer"),
    "a field without a name": ("{a}\n{}[[{b}]]", 2, "found {}, expected {name}"),
    "a field with a dot at its end": ("{a.}[[{b}]]", 1, "found {a.}, expected {name}"),
    "an element that is no number": ("{a.b}[[{b}]]", 1, "found {a.b}, expected {name}"),
    "a negative element": ("{a.-1}[[{b}]]", 1, "found {a.-1}, expected {name}"),
    "an attribute": ("{a.__class__}[[{b}]]", 1, "found {a.__class__}, expected"),
    "two dots": ("{a..}[[{b}]]", 1, "found {a..}, expected"),
    "one word": ("x[[{b=yes}]]", 1, "found {b=yes}, expected"),
    "no word": ("x[[{b=}]]", 1, "found {b=}, expected"),
    "an empty word": ("x[[{b=yes,}]]", 1, "found {b=yes,}, expected"),
    "a word twice": ("x[[{b=yes,no,yes}]]", 1, "found {b=yes,no,yes}, expected"),
    "words of a list": ("x[[{b.0=yes,no}]]", 1, "found {b.0=yes,no}, expected"),
    "words outside the answer": ("x\n{a=yes,no}[[{b}]]", 2, "{a=yes,no} outside the answer"),
    "a cut inside the answer": ("{a}\n\n[[{b...}]]", 3, "{b...} inside the answer"),
    "in the second alternative": ("{a}\n[[{b}]]\n=====\n\n{a\n[[{b}]]", 5, "{ without its other half"),
    "in the third alternative": ("{a}\n[[{b}]]\n=====\n[[{b}]]\n=====\n}[[{b}]]", 6, "} without its other half"),
    "a separator that ends the file": ("{a}\n[[{b}]]\n=====", 2, "found '\\n=====' after the answer"),
}


@pytest.mark.parametrize("case", SYNTAX_ERRORS)
def test_a_mistake_in_a_template_is_named_by_file_and_line(case):
    """R15, where the file is the user's template: one line that says where, what and what was expected."""
    source, line, expected = SYNTAX_ERRORS[case]
    told = refused(source)
    assert told.startswith(f"--template my.txt:{line}: ") and expected in told, told


@pytest.mark.parametrize("source, expected", [
    ("", "no [[answer]] with a {field}"),
    ("{a}", "no [[answer]] with a {field}"),
    ("{a}\n[[{b}", "no [[answer]] with a {field}"),
    ("{a}\n[[{b}]", "no [[answer]] with a {field}"),
    ("{a}[[yes]]", "no [[answer]] with a {field}"),
    ("{a}[[]]", "no [[answer]] with a {field}"),
    ("{a}\n[[{b}]]\n=====\n", "no [[answer]] with a {field}"),
    ("{a}[[{b=x,y}{c}]]", "one of a few words has no other field"),
    ("{a}[[{b=x,y}{c=x,y}]]", "one of a few words has no other field"),
    ("{a}[[{b}]]\n=====\n[[{b=x,y}]]", "different answers"),
    ("{a}[[{b=x,y}]]\n=====\n[[{b=y,x}]]", "different answers"),
    ("{a}[[{b=x,y}]]\n=====\n[[ {b=x,y}]]", "different answers"),
])
def test_a_template_without_one_answer_to_learn_is_named(source, expected):
    """C3: nothing that has no label, and no word whose number would mean another elsewhere."""
    told = refused(source)
    assert told.startswith("--template my.txt:") and expected in told, told


def test_alternatives_share_the_words_of_their_answer():
    """The words of all alternatives are the same: then a row's number means the same whichever it gets."""
    template = Template("my.txt", "{a}:[[ {b=x,y}]]\n=====\n?[[ {b=x,y}]]")
    assert template.answers == (" x", " y")
    assert [texts_of(template, row) for row in ({"a": "A", "b": 1}, {"b": "x"})] == [["A:", " y"], ["?", " x"]]


LONG = {f"field{i}": i for i in range(20)}
TYPES = Template("my.txt", "{a}{l.0}\n[[{z}]]\n=====\n{l.1}[[{z}]]")
CHOICE = Template("my.txt", "{a...}[[{z=no,yes}]]")
MISFITS = [
    (TYPES, {"a": 7, "z": "Z"}, "found fields {'a': int, 'z': str}, expected {a: str or nothing, l: list of str, z:"),
    (TYPES, {"a": ["A"], "z": "Z"}, "found fields {'a': list, 'z': str}, expected"),
    (TYPES, {"a": {"b": 1}, "l": ["x", "y"], "z": "Z"}, "found fields {'a': dict, 'l': list, 'z': str}, expected"),
    (TYPES, {"l": "xy", "z": "Z"}, "found fields {'l': str, 'z': str}, expected"),
    (TYPES, {"l": [1, 2], "z": "Z"}, "found fields {'l': list, 'z': str}, expected"),
    (TYPES, {"l": ["x", "y"], "z": True}, "found fields {'l': list, 'z': bool}, expected"),
    (TYPES, {"l": ["x", "y"]}, "found fields {'l': list}, expected"),
    (TYPES, {"z": "Z"}, "found fields {'z': str}, expected"),
    (TYPES, {}, "found fields {}, expected"),
    (TYPES, {"l": None, "z": "Z"}, "found fields {'l': NoneType, 'z': str}, expected"),
    (TYPES, {"l": ["x"], "z": "Z"}, "l.1 is empty"),
    (TYPES, {"l": ["x", " \n"], "z": "Z"}, "l.1 is empty"),
    (TYPES, {"l": ["x", "y"], "z": ""}, "z is empty"),
    (TYPES, {"l": ["x", "y"], "z": "\t\u00a0\n"}, "z is empty"),
    (TYPES, LONG, "'field7': int, ...}, expected"),
    (TYPES, {"new\nline": 1, "x" * 999: 2}, "{'new\\nline': int, "),
    (CHOICE, {"a": "A", "z": 2}, "z is 2, expected 0 (no) or 1 (yes)"),
    (CHOICE, {"a": "A", "z": -1}, "z is -1, expected 0 (no) or 1 (yes)"),
    (CHOICE, {"a": "A", "z": "maybe"}, "z is 'maybe', expected 0 (no) or 1 (yes)"),
    (CHOICE, {"a": "A", "z": "2"}, "z is 2, expected 0 (no) or 1 (yes)"),
    (CHOICE, {"a": "A", "z": "1.0"}, "z is '1.0', expected 0 (no) or 1 (yes)"),
    (CHOICE, {"a": "A", "z": "y\n" * 999}, "z is 'y\\ny"),
    (CHOICE, {"a": "A", "z": 10**60}, "expected 0 (no) or 1 (yes)"),
    (CHOICE, {"a": "A", "z": True}, "found fields {'a': str, 'z': bool}, expected {a: str, z: int or word}"),
    (CHOICE, {"a": "A", "z": 1.0}, "found fields {'a': str, 'z': float}, expected"),
    (CHOICE, {"a": "A", "z": ["no"]}, "found fields {'a': str, 'z': list}, expected"),
    (CHOICE, {"a": "A", "z": None}, "found fields {'a': str, 'z': NoneType}, expected"),
    (CHOICE, {"a": "A"}, "found fields {'a': str}, expected"),
    (CHOICE, {"a": "", "z": 1}, "a is empty"),
]


@pytest.mark.parametrize("template, row, expected", MISFITS, ids=lambda value: str(value)[:40])
def test_a_row_that_does_not_fit_is_told_what_was_wanted_and_what_was_found(template, row, expected):
    """R15: one line that begins with the place, and stays short whatever the row says."""
    told = misfit(template, row)
    assert told.startswith("data.jsonl:7: ") and expected in told, told


@pytest.mark.parametrize("text, expected", [
    ("a\0b", "character 1 of {} is NUL, expected text"), ("\0", "character 0 of {} is NUL, expected text"),
    ("ab\ud800", "character 2 of {} is a lone surrogate"), ("\udfff", "character 0 of {} is a lone surrogate"),
    ("x" * (LONGEST_LINE + 1), f"{{}} has {LONGEST_LINE + 1} characters"),
], ids=["NUL", "only NUL", "surrogate", "only a surrogate", "too long"])
@pytest.mark.parametrize("name", ["a", "l", "z"])
def test_what_no_file_of_text_holds_on_purpose_is_refused(text, expected, name):
    """R15: in a field of the prompt, in a list, in the answer."""
    row = {"a": "A", "l": ["L", "M"], "z": "Z"} | {name: [text] if name == "l" else text}
    told = misfit(TYPES, row)
    assert told.startswith("data.jsonl:7: ") and expected.format(name) in told


@pytest.mark.parametrize("text", [*HOSTILE, "{a}{b}{z}", "{a.0}", "{z=no,yes}", "{a...}", "]]{", "=====", "\\n"])
def test_what_a_row_says_is_never_evaluated(text):
    """C20, R16: no field, escape or separator is looked for in it, wherever it is put in."""
    template = Template("my.txt", "<{a}|{b...}>\n[[{z}]]")
    expected = [f"<{text}|", text, ">\n", text, END] if text.strip() else None
    assert texts_of(template, dict.fromkeys("abz", text)) == expected
    assert texts_of(template, {"a": "{b}", "b": "{z}", "z": "{a}"}) == ["<{b}|", "{z}", ">\n", "{a}", END]


@settings(derandomize=True, database=None, max_examples=300, deadline=None)
@given(before=st.text("{}[]ab=.,\n é", max_size=12), after=st.text("{}[]ab=.\n", max_size=8), value=st.text(min_size=1))
def test_any_literal_text_comes_back_with_its_braces_doubled(before, after, value):
    """R16: what is written in a template is what stands in the prompt; only [[ and ]] cannot be written."""
    before, after = (re.sub(r"\[+", "[", re.sub(r"\]+", "]", text)) for text in (before, after))
    escaped = [text.replace("{", "{{").replace("}", "}}") for text in (before, after)]
    template = Template("my.txt", f"{escaped[0]}x{{a}}{escaped[1]}x[[{{a}}]]\n")
    try:
        value.encode()
        assert value.strip() and "\0" not in value
    except (UnicodeEncodeError, AssertionError):
        assert misfit(template, {"a": value})
        return
    assert texts_of(template, {"a": value}) == [f"{before}x{value}{after}x", value, END]


# The prompts of the recipes


GOLDEN = {
    "imdb": ({"text": "I liked it.", "label": 1}, """\
Given a movie review/comment by a user in following format:
#### Movie review:
<review>
#### Answer:
<answer>
Please rate the movie review as positive or negative from the perspective of the user's overall personal feelings to \
the movie. Answer it with only 'positive' or 'negative' without any explanation.

#### Movie review:
I liked it.

#### Answer:""", " positive", ["I liked it."]),
    "alpaca": ({"instruction": "Translate.", "input": "Ja.", "output": "Yes."}, """\
Below is an instruction that describes a task, paired with an input that provides further context. Write a response \
that appropriately completes the request.

### Instruction:
Translate.

### Input:
Ja.

### Response:
""", "Yes.", ["Ja."]),
    "alpaca without input": ({"instruction": "Say yes.", "input": "", "output": "Yes."}, """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Say yes.

### Response:
""", "Yes.", []),
    "dolly": ({"instruction": "Who?", "context": "It was he.", "response": "He.", "category": "closed_qa"},
              "### Instruction\nWho?\n\n### Context\nIt was he.\n\n### Answer\n", "He.", ["It was he."]),
    "dolly without context": ({"instruction": "Who?", "context": "", "response": "He."},
                              "### Instruction\nWho?\n\n### Answer\n", "He.", []),
    "quotes": ({"quote": "“Be.”", "author": "I", "tags": ["x"]}, "A quote by I:\n", "“Be.”", []),
    "quotes without author": ({"quote": "“Be.”", "author": None}, "A quote:\n", "“Be.”", []),
    "grammar": ({"sentence": "He go .", "corrections": ["He goes .", "He went ."]},
                "Correct this to standard English: He go .\n---\nCorrected:", " He goes .", []),
    "gsm8k": ({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, "Question: 1+1?\nAnswer:",
              " 1+1=<<1+1=2>>2\n#### 2", []),
    "prompt_completion": ({"prompt": "1+1=", "completion": "2"}, "1+1=", "2", []),
    "input_output": ({"input": "1+1?", "output": "2"}, "1+1?\n", "2", []),
    "text": ({"text": "Call me Ishmael."}, "", "Call me Ishmael.", []),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_every_prompt_is_the_recipes_word_for_word(case):
    """C12: prompt, answer, and what of the prompt may be cut."""
    row, prompt, answer, may_cut = GOLDEN[case]
    template = TEMPLATES[case.split()[0]]
    segments, index = template.render(row, "here")
    assert "".join(s.text for s in segments if not s.answer) == prompt
    ends = [] if template.answers else [Segment(END, answer=True, control=True)]
    assert [s for s in segments if s.answer] == [Segment(answer, True, may_cut=bool(ends)), *ends]
    assert [s.text for s in segments if s.may_cut and not s.answer] == may_cut
    assert not any(s.starts_text or s.control for s in segments if not s.answer)
    assert index == (1 if template.answers else -1)


def test_every_built_in_template_has_a_golden_prompt():
    assert {case.split()[0] for case in GOLDEN} == set(TEMPLATES)


def seed(number: int) -> str:
    found = sorted(SEEDS.glob(f"{number:03d}*.txt"))
    if not found:
        pytest.skip("the seeds are absent")
    return found[0].read_text()


@pytest.mark.parametrize("label", [0, 1, "negative", "positive"])
def test_the_imdb_prompt_equals_the_text_that_the_notebook_formats(label):
    """Its f-strings are read from the seed itself: part1.format(text) + part2.format(label)."""
    found = re.findall(r"prompt_part([12]) = \\\nf'''(.*?)'''", seed(0), re.DOTALL)
    assert len(found) >= 2
    parts = {number: text.replace("{{", "{").replace("}}", "}") for number, text in found}  # what f''' makes of it
    word = {0: "negative", 1: "positive"}.get(label, label)
    for text in ("It was {text} or {label}.", *random_texts(50)):
        expected = parts["1"].format(text=text) + parts["2"].format(label=word)
        assert "".join(texts_of(TEMPLATES["imdb"], {"text": text, "label": label})) == expected


def test_the_alpaca_prompt_equals_what_the_notebooks_own_prompter_builds():
    """AlpacaPrompter is run as it stands in seed 001, with and without an input, on hostile texts too."""
    source = seed(1)
    source = source[source.index("class PromptStyle(Enum):") : source.index("class PromptTokenizingStrategy")]
    names = {"Enum": Enum, **vars(typing)}
    exec(source, names)
    prompter, texts = names["AlpacaPrompter"]("instruct"), random_texts(300, seed=1)
    for instruction, context, output in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
        for optional in (context, "", None):
            row = {"instruction": instruction, "input": optional, "output": output}
            assert "".join(texts_of(TEMPLATES["alpaca"], row)) == next(prompter.build_prompt(**row))


# Prompts, labels, control tokens: properties of every template with every tokenizer

USER = Template("user.txt", "{opening...}\nSpeaker {name}: {{{speech...}}}\n\n[[{reply.1} ]]\n=====\n"
                            "Speaker: {speech...} [[{reply.1} ]]\n")
Text = Callable[[], str]
ROWS: dict[str, Callable[[Text, int], dict]] = {
    "imdb": lambda text, i: {"text": text(), "label": i % 2},
    "alpaca": lambda text, i: {"instruction": text(), "input": text() if i % 3 else "", "output": text()},
    "dolly": lambda text, i: {"instruction": text(), "context": text() if i % 3 else " ", "response": text()},
    "quotes": lambda text, i: {"quote": text(), "author": text() if i % 3 else None},
    "grammar": lambda text, i: {"sentence": text(), "corrections": [text(), text()]},
    "gsm8k": lambda text, i: {"question": text(), "answer": text()},
    "prompt_completion": lambda text, i: {"prompt": text(), "completion": text()},
    "input_output": lambda text, i: {"input": text(), "output": text()},
    "user": lambda text, i: {"opening": text(), "speech": text(), "reply": ["", text()], "name": "N" if i % 3 else ""},
}


def control_ids(tokenizer: Tokenizer) -> set[int]:
    """Asked of the file itself."""
    file = tokenizer.files[0]
    if file.suffix == ".json":
        return {token["id"] for token in json.loads(file.read_text())["added_tokens"] if len(token["content"]) > 1}
    if tokenizer.vocab_size == 128_256:
        return set(range(128_000, 128_256))
    from sentencepiece import SentencePieceProcessor

    codec = SentencePieceProcessor(model_file=str(file))
    return {i for i in range(codec.vocab_size()) if codec.is_control(i) or codec.is_unknown(i)}


class Case(NamedTuple):
    segments: list[Segment]
    prompt: list[int]  # as inference has it
    example: Encoded  # as training has it


class Many(NamedTuple):
    tokenizer: Tokenizer
    template: Template
    cases: list[Case]


def rows_of(name: str, count: int, seed: int = 0) -> list[dict]:
    texts = iter(random_texts(4 * count, seed))
    return [ROWS[name](lambda: next(texts), i) for i in range(count)]


def find(name: str) -> Template:
    return USER if name == "user" else TEMPLATES[name]


MANY = [(name, 400) for name in ROWS]
MANY += [pytest.param((name, 10_000 if name == "imdb" else 1500), marks=pytest.mark.slow) for name in ROWS]


@pytest.fixture(scope="module", params=MANY, ids=str)
def many(request, tokenizer) -> Many:
    """Rows of hostile texts: the prompt as it is at inference, the whole as it is trained on."""
    name, count = request.param
    template = find(name)
    rendered = [template.render(row, "here")[0] for row in rows_of(name, count)]
    prompts = encode_rows([[s for s in segments if not s.answer] for segments in rendered], tokenizer, 10**6, "right")
    trained = encode_rows(rendered, tokenizer, 10**6, "right")
    cases = [Case(segments, prompt.ids, example)
             for segments, prompt, example in zip(rendered, prompts, trained, strict=True)]
    return Many(tokenizer, template, cases)


def test_the_properties_are_of_every_built_in_template():
    assert set(ROWS) == {*TEMPLATES, "user"} - {"text"}  # which has no prompt: see the test of its own


def test_the_prompt_at_inference_is_a_strict_prefix_of_what_was_trained_on(many):
    """C12, C13: and exactly what follows it is labelled."""
    for _, prompt, (ids, is_answer, was_cut) in many.cases:
        assert ids[: len(prompt)] == prompt and len(ids) > len(prompt) and not was_cut
        assert is_answer == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_there_is_one_beginning_of_text_and_no_other_control_token_but_the_end(many):
    """C14, C15, C20, R16: whatever the rows say. A free answer ends with the end token, a label; a word has none."""
    tokenizer, template, cases = many
    control = control_ids(tokenizer)
    assert tokenizer.eos_id in control and (tokenizer.bos_id is None or tokenizer.bos_id in control)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if template.answers else [tokenizer.eos_id]
    for _, prompt, (ids, is_answer, _) in cases:
        assert prompt[: len(begin)] == begin and control.isdisjoint(prompt[len(begin) :])
        assert ids[: len(begin)] == begin and control.isdisjoint(ids[len(begin) : len(ids) - len(end)])
        assert ids[len(ids) - len(end) :] == end and is_answer[-1]


def test_what_is_labelled_decodes_to_the_answer_and_the_rest_to_the_prompt(many):
    """C12, C18: nothing is lost or moved at the seams; half of a character would be U+FFFD."""
    for segments, prompt, (ids, is_answer, _) in many.cases[:1500]:
        labels = [id for id, labelled in zip(ids, is_answer, strict=True) if labelled]
        assert many.tokenizer.decode(labels, starts_text=False) == "".join(s.text for s in segments if s.answer)
        assert many.tokenizer.decode(prompt) == "".join(s.text for s in segments if not s.answer)


def test_both_words_of_a_choice_have_the_same_prompt_and_other_labels(tokenizer):
    """C13: so that the two can be compared where a prompt ends."""
    for row in rows_of("imdb", 200, seed=3):
        both = [TEMPLATES["imdb"].render(row | {"label": label}, "here")[0] for label in (0, 1)]
        (no, no_labels, _), (yes, yes_labels, _) = encode_rows(both, tokenizer, 10**6, "right")
        prompt = no_labels.index(True)
        assert yes_labels.index(True) == prompt and no[:prompt] == yes[:prompt] and no[prompt] != yes[prompt]


def cut_by_definition(
    segments: list[Segment], tokenizer: Tokenizer, max_length: int, side: str
) -> tuple[list[int], list[bool]] | None:
    """Token by token: from the first part of the prompt that may be cut and has one left, else from the end."""
    pieces = [([] if s.control else tokenizer.encode(s.text, starts_text=i == 0)) for i, s in enumerate(segments)]
    begin = [pieces[0].pop(0)] if tokenizer.bos_id is not None else []
    if segments[-1].control:
        pieces[-1] = [tokenizer.eos_id]
    shrinks = [piece for piece, s in zip(pieces, segments, strict=True) if s.may_cut and not s.answer]
    while len(begin) + sum(map(len, pieces)) > max_length:
        if left := next((piece for piece in shrinks if piece), None):
            left.pop(0 if side == "left" else -1)
        elif any(s.may_cut and s.answer for s in segments) and any(pieces):
            next(piece for piece in reversed(pieces) if piece).pop()
        else:
            return None
    ids = [*begin, *sum(pieces, [])]
    labels = [s.answer for piece, s in zip(pieces, segments, strict=True) for _ in piece]
    return (ids, [False] * len(begin) + labels) if any(labels) else None


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.slow
def test_the_prompt_is_cut_first_from_the_chosen_side_and_then_the_end_of_the_answer(tokenizer, name, side):
    """C16, C17: an answer that was cut has no end token, and no example is without a label."""
    template, outcomes = find(name), set()
    for number, row in enumerate(rows_of(name, 60, seed=4)):
        segments = template.render(row, "here")[0]
        ((whole, whole_labels, _),) = encode_rows([segments], tokenizer, 10**6, side)
        answer = sum(whole_labels)
        begin = 0 if tokenizer.bos_id is None else 1
        fixed = len(whole) - sum(len(tokenizer.encode(s.text, starts_text=i == 0)) - (begin if i == 0 else 0)
                                 for i, s in enumerate(segments) if s.may_cut and not s.answer)
        chance = random.Random(number)
        lengths = {len(whole), len(whole) - 1, fixed, fixed - 1, fixed - answer + 1, fixed - answer, 1,
                   *(chance.randrange(1, len(whole) + 5) for _ in range(3))}
        for length in sorted(lengths - {0}):
            (found,) = encode_rows([segments], tokenizer, length, side)
            expected = cut_by_definition(segments, tokenizer, length, side)
            assert (found and found[:2]) == expected
            if found is None:
                assert length < fixed and (template.answers or length <= fixed - answer)
                outcomes.add("none")
                continue
            ids, labels, was_cut = found
            kept = sum(labels)
            assert len(ids) <= length and 0 < kept <= answer and was_cut == (len(whole) > length)
            assert kept == answer or ids[-1] != tokenizer.eos_id and not template.answers
            assert (length >= fixed) == (kept == answer)
            outcomes.add("whole" if not was_cut else "prompt cut" if kept == answer else "answer cut")
    # Every case has come up: only words are never cut, only some prompts are.
    cut_nowhere = ("quotes", "grammar", "gsm8k", "prompt_completion", "input_output")
    never = {"answer cut"} if template.answers else {"prompt cut"} if name in cut_nowhere else set()
    assert outcomes == {"whole", "prompt cut", "answer cut", "none"} - never


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_field_that_begins_the_text_is_cut_after_its_beginning_of_text(tokenizer, side):
    """C14, C17: BOS stays at position 0, once, however little is left of the text."""
    segments = Template("my.txt", "{a...}[[ {z}]]").render({"a": "one two three four five", "z": "done"}, "here")[0]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    text, answer = tokenizer.encode(segments[0].text)[len(begin) :], tokenizer.encode(" done", starts_text=False)
    for left in range(len(text)):
        length = len(begin) + left + len(answer) + 1
        ((ids, _, _),) = encode_rows([segments], tokenizer, length, side)
        kept = text[len(text) - left :] if side == "left" else text[:left]
        assert ids == [*begin, *kept, *answer, tokenizer.eos_id]


@pytest.mark.parametrize("name", ROWS)
def test_examples_do_not_depend_on_what_they_are_encoded_with(tokenizer, name):
    """C12: a batch, or alone, in any order: the same ids, as inference encodes one prompt at a time."""
    rows = [find(name).render(row, "here")[0] for row in rows_of(name, 100, seed=5)]
    together = encode_rows(rows, tokenizer, 120, "left")
    assert together == [encode_rows([row], tokenizer, 120, "left")[0] for row in rows]
    order = random.Random(1).sample(range(len(rows)), len(rows))
    assert encode_rows([rows[i] for i in order], tokenizer, 120, "left") == [together[i] for i in order]


@pytest.mark.slow
def test_with_llama_2_no_lone_space_comes_before_an_answer(assets):
    """C13, C18: one token each for the words, 8178 and 6374 as in seed 000; never 29871, a trailing space."""
    tokenizer = loaded(assets / REAL["llama2"])
    for label, answer in ((0, 8178), (1, 6374)):
        for text in random_texts(200):
            segments, _ = TEMPLATES["imdb"].render({"text": text.strip() + "x", "label": label}, "here")
            ((ids, is_answer, _),) = encode_rows([segments], tokenizer, 10**6, "right")
            assert ids[-1] == answer and sum(is_answer) == 1 and ids[-2] != 29871
    for name in ("grammar", "gsm8k"):  # their answers bring their own space along
        row = {"question": "Q", "sentence": "S", "answer": "Yes", "corrections": ["Yes"]}
        ((ids, is_answer, _),) = encode_rows([find(name).render(row, "here")[0]], tokenizer, 1000, "right")
        assert 29871 not in ids and ids[-2:] == [tokenizer.encode("Yes")[1], 2] and sum(is_answer) == 2


@settings(derandomize=True, database=None, max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=30), side=st.sampled_from(["left", "right"]), length=st.integers(80, 130))
def test_any_text_is_rendered_and_fits(text, side, length):
    """C17, R16: whatever Unicode it is made of; or it is refused."""
    tokenizer = loaded(BUNDLED)
    row, template = {"text": text, "label": 0}, TEMPLATES["imdb"]
    try:
        text.encode()
        assert text.strip() and "\0" not in text
    except (UnicodeEncodeError, AssertionError):
        assert misfit(template, row).startswith("data.jsonl:7: ")
        return
    segments, _ = template.render(row, "here")
    (example,) = encode_rows([segments], tokenizer, length, side)
    fixed = len(encode_rows([[s for s in segments if not s.may_cut]], tokenizer, 1000, "right")[0].ids)
    assert (example is None) == (fixed > length)
    if example:
        assert fixed <= len(example.ids) <= length and sum(example.is_answer) == 1 and example.is_answer[-1]


@pytest.mark.parametrize("value", [1, 2, 3])
def test_a_number_that_could_be_a_place_or_a_word_is_refused(value):
    """R15: star ratings would silently shift by one."""
    stars = Template("stars", "Stars:[[ {stars=1,2,3}]]")
    with pytest.raises(UserError, match=f"^here: stars is the number {value}, which is also a word"):
        stars.render({"stars": value}, "here")
    segments, answer = stars.render({"stars": str(value)}, "here")
    assert segments[-1].text == f" {value}" and answer == value - 1
    assert stars.render({"stars": 0}, "here")[0][-1].text == " 1"


@pytest.mark.parametrize("source", ["{{}}\n" * 20_000 + "[[{a}]]", "{a} " * 20_000 + "[[{a}]]"])
def test_a_long_template_is_parsed_and_a_longer_one_refused(source):
    """R15: were its time to grow with the square of its length, this would take minutes."""
    Template("long", source)
    with pytest.raises(UserError, match="^--template long: [0-9]+ characters, expected 1048576 at most$"):
        Template("long", source * 20)
