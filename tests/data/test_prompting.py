"""The prompts that a model answers are those that it was trained on."""

import random

import pytest
from chats import TURN, TURN_END, write_tokenizer
from samples import REAL, bundled_with, loaded, random_texts, write_rows

from llama.boundary.errors import UserError
from llama.data.chat import Chat
from llama.data.encoding import encode_rows
from llama.data.examples import BadRows
from llama.data.formats import find_template
from llama.data.layouts import CONTROL_TOKENS, LAYOUTS
from llama.data.prompting import (
    Room,
    asking,
    before_answer,
    one_prompt,
    prompt_ids,
    read_prompts,
    room_of,
    row_of,
    spelled,
)
from llama.data.sources import Source
from llama.data.templates import TEMPLATES, Template

WIDE = Room(1 << 20, 1 << 20)


def rows_for(name: str, count: int, seed: int) -> list[dict]:
    """Rows of random texts with every field of a template, some without what may be absent."""
    texts = iter([text if text.strip() else "x" for text in random_texts(8 * count, seed)])
    template = TEMPLATES[name]
    rows = []
    for i in range(count):
        row: dict = {field: next(texts) for field in sorted(template.columns)}
        for field in template.columns - template.fields:
            row[field] = "" if i % 3 == 0 else row[field]
        if name == "imdb":
            row["label"] = i % 2
        if name == "grammar":
            row["corrections"] = [row["corrections"]]
        rows.append(row)
    return rows


def without_answer(name: str, row: dict) -> dict:
    return {field: value for field, value in row.items() if field in asking(TEMPLATES[name]).asked}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_training_has_before_the_answer_with_or_without_an_answer_in_the_row(tokenizer, name):
    """C12, C13, C14: a strict prefix of the example's ids, for random texts and each kind of tokenizer."""
    template = TEMPLATES[name]
    if name == "text" and tokenizer.bos_id is None:
        pytest.skip("nothing comes before such a text")
    for row in rows_for(name, 40, seed=1):
        (example,) = encode_rows([template.render(row, "here")[0]], tokenizer, 1 << 20, "right")
        for asked in (row, without_answer(name, row), dict.fromkeys(row) | without_answer(name, row)):
            segments, _ = asking(template).render(asked, "here")
            ids, was_cut = prompt_ids(before_answer(segments), tokenizer, WIDE)
            assert ids == example.ids[: len(ids)] and len(ids) < len(example.ids) and not was_cut
            assert len(ids) == example.is_answer.index(True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_prompt_is_cut_where_training_cuts_it(bundled, side):
    """C12, C13: the room of the longest answer word stays free; what follows the text is kept."""
    longest = max(len(bundled.encode(word, starts_text=False)) for word in TEMPLATES["imdb"].answers)
    for row in rows_for("imdb", 20, seed=2):
        row["text"] = (row["text"] + " and ") * 50
        segments = TEMPLATES["imdb"].render(row, "here")[0]
        for length in (150, 200, 400):
            (example,) = encode_rows([segments], bundled, length, side, longest)
            room = Room(length - longest, 1 << 20, side)
            ids, was_cut = prompt_ids(before_answer(segments), bundled, room)
            assert ids == example.ids[: example.is_answer.index(True)] and was_cut == example.was_cut


def conversations(count: int, seed: int) -> list[list[dict]]:
    draw = random.Random(seed)
    texts = iter([text if text.strip() else "x" for text in random_texts(20 * count, seed)])
    talks = []
    for _ in range(count):
        talk = [{"role": "system", "content": next(texts)}] if draw.random() < 0.5 else []
        for _ in range(draw.randrange(1, 4)):
            talk += [{"role": "user", "content": next(texts)}, {"role": "assistant", "content": next(texts)}]
        talks.append(talk)
    return talks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversations_prompt_is_what_training_has_before_its_last_answer(tmp_path, layout):
    """C12, C13, C14: whether the last answer is in the row or not, and whatever is learned of the earlier ones."""
    tokenizer = bundled_with(tmp_path, *CONTROL_TOKENS.get(layout, ()))
    check_conversations(tokenizer, Chat(layout), 40)


@pytest.mark.slow
@pytest.mark.parametrize("name, layout", [("llama2", "llama2"), ("llama2", "zephyr"), ("llama2", "prompter"),
                                          ("smollm2", "chatml"), ("llama3", "llama3")])  # fmt: skip
def test_a_conversations_prompt_is_a_prefix_of_training_with_real_tokenizers(assets, name, layout):
    """C12, C13, C14."""
    check_conversations(loaded(assets / REAL[name]), Chat(layout), 100)


def check_conversations(tokenizer, chat: Chat, count: int) -> None:
    for talk in conversations(count, seed=3):
        (example,) = encode_rows([chat.render({"messages": talk}, "here")[0]], tokenizer, 1 << 20, "right")
        last = max(i for i, is_answer in enumerate(example.is_answer) if is_answer)
        while example.is_answer[last]:
            last -= 1
        weighted = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in talk]
        rows = [{"messages": talk}, {"messages": talk[:-1]}, {"messages": weighted},
                {"prompt": talk[:-1], "completion": talk[-1:]}, {"prompt": talk[:-1]}]  # fmt: skip
        for row in rows:
            ids, _ = prompt_ids(before_answer(asking(chat).render(row, "here")[0]), tokenizer, WIDE)
            assert ids == example.ids[: last + 1]


def test_the_rows_of_a_file_become_prompts_with_their_answers_where_they_have_them(tmp_path, bundled):
    rows = [{"text": "Fine.", "label": 1}, {"text": "Dull."}, {"text": "a </s> b", "label": None, "stars": 3}]
    found = read_prompts([write_rows(tmp_path / "rows.jsonl", rows)], TEMPLATES["imdb"], bundled, WIDE)
    before, _, after = TEMPLATES["imdb"].source.partition("{text...}")
    assert [(prompt.row, prompt.reference, prompt.was_cut) for prompt in found.prompts] == [
        (1, "positive", False), (2, None, False), (3, None, False)]  # fmt: skip
    assert [prompt.text for prompt in found.prompts] == [
        before + row["text"] + after.partition("[[")[0] for row in rows]  # fmt: skip
    assert found.notes() == ["fields of the rows that are not used: 'stars'"]
    free = [{"question": "1+1?", "answer": "It is 2. #### 2"}]
    (prompt,) = read_prompts([write_rows(tmp_path / "free.jsonl", free)], TEMPLATES["gsm8k"], bundled, WIDE).prompts
    assert (prompt.text, prompt.reference) == ("Question: 1+1?\nAnswer:", "It is 2. #### 2")


def test_an_answer_never_changes_its_prompt(tmp_path, bundled):
    """Also not through its length: room is left for every answer alike."""
    rows = [{"instruction": "Say it", "input": "word " * 200, "output": output} for output in ("x", "y " * 300)]
    rows.append({"instruction": "Say it", "input": "word " * 200})
    found = read_prompts([write_rows(tmp_path / "r.jsonl", rows)], TEMPLATES["alpaca"], bundled, Room(150, 200))
    first, second, third = found.prompts
    assert first.ids == second.ids == third.ids and len(first.ids) == 150
    assert found.notes() == ["3 of 3 prompts were cut, where the template allows it"]


def test_a_conversation_is_shown_with_its_control_tokens_and_ends_where_the_answer_begins(tmp_path):
    write_tokenizer(tmp_path / "folder")
    tokenizer = loaded(tmp_path / "folder")
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    path = write_rows(tmp_path / "talks.jsonl", [{"messages": talk}, {"messages": talk[:2]}])
    asked, answered = read_prompts([path], Chat("chatml"), tokenizer, WIDE).prompts
    first = f"{TURN}user\nHi{TURN_END}\n{TURN}assistant\n"
    assert (asked.text, asked.reference) == (
        f"{first}Hello{TURN_END}\n{TURN}user\nBye{TURN_END}\n{TURN}assistant\n",
        None,
    )
    assert (answered.text, answered.reference) == (first, "Hello")


def test_rows_that_cannot_be_asked_are_named_or_left_out_and_counted(tmp_path, bundled):
    rows = [
        {"question": "a"},
        {"question": ""},
        {"question": "b " * 400},
        {"question": 5},
        {"question": "a", "answer": 7},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadRows) as error:
        read_prompts([path], TEMPLATES["gsm8k"], bundled, Room(100, 200))
    lines = error.value.lines
    assert lines[0] == f"{path}:2: question is empty" and "4 of 5 rows cannot be used" in lines[-1]
    assert lines[1].startswith(f"{path}:3: a prompt of ") and "expected 200 at most" in lines[1]
    found = read_prompts([path], TEMPLATES["gsm8k"], bundled, Room(100, 200), skip_bad_rows=True)
    assert len(found.prompts) == 1 and found.bad_row_count == 4
    assert found.notes()[0].startswith(f"4 bad rows were left out, the first: {path}:2")
    with pytest.raises(UserError, match="none of 1 rows can be used; "):
        read_prompts([write_rows(tmp_path / "bad.jsonl", rows[1:2])], TEMPLATES["gsm8k"], bundled, WIDE, None, True)


@pytest.mark.parametrize("messages, problem", [
    ([], "messages is empty, expected messages"),
    ([{"role": "user", "content": "a"}] * 2, "roles user, user, assistant; expected user and assistant in turn"),
    ([{"role": "assistant", "content": "a"}], "roles assistant; expected user and assistant in turn"),
])  # fmt: skip
def test_a_conversation_that_the_layout_cannot_express_is_refused(messages, problem):
    with pytest.raises(UserError, match=problem):
        asking(Chat("llama2")).render({"messages": messages}, "row")


def test_what_a_prompt_keeps_when_it_is_cut_and_when_it_is_refused(bundled):
    """What training may cut is cut to `cut_to`; the fixed text may be longer, up to `at_most`."""
    segments = before_answer(TEMPLATES["gsm8k"].render({"question": "why " * 30, "answer": "x"}, "here")[0])
    whole, was_cut = prompt_ids(segments, bundled, Room(10, 500))
    assert not was_cut and spelled(whole, bundled) == "Question: " + "why " * 30 + "\nAnswer:"
    with pytest.raises(UserError, match=f"row 7: a prompt of {len(whole)} tokens, expected {len(whole) - 1} at most"):
        prompt_ids(segments, bundled, Room(10, len(whole) - 1), "row 7: ")


def test_an_empty_prompt_is_bos_alone_and_without_bos_it_is_refused(tmp_path, bundled):
    assert prompt_ids([], bundled, WIDE) == ([bundled.bos_id], False)
    write_tokenizer(tmp_path / "folder")
    with pytest.raises(UserError, match="an empty prompt, and this tokenizer has no BOS to begin with"):
        prompt_ids([], loaded(tmp_path / "folder"), WIDE)


def test_one_text_fills_the_only_field_that_a_templates_prompt_needs():
    own = Template("own.txt", "{a}, {b}\n[[{c}]]")
    assert row_of(TEMPLATES["alpaca"], "Hi") == {"instruction": "Hi"}
    assert row_of(TEMPLATES["quotes"], "Hi") == {"author": "Hi"}
    assert row_of(Template("list.txt", "{a.1}[[{c}]]"), "Hi") == {"a": ["Hi", "Hi"]}
    for template, found in ((own, "needs a and b"), (TEMPLATES["text"], "has no field in its prompt")):
        with pytest.raises(UserError, match=f"--template {template.name}: {found}, expected one field for --prompt"):
            row_of(template, "Hi")


@pytest.mark.parametrize("row, name", [
    ({"prompt": "a"}, "prompt_completion"), ({"question": "a"}, "gsm8k"), ({"sentence": "a"}, "grammar"),
    ({"instruction": "a", "input": "b"}, "alpaca"), ({"instruction": "a", "context": "b"}, "dolly"),
    ({"instruction": "a", "input": "b", "output": "c"}, "alpaca"), ({"author": "a"}, "quotes"),
    ({"messages": [{"role": "user", "content": "a"}]}, "llama2"),
    ({"prompt": [{"role": "user", "content": "a"}]}, "llama2"),
    ({"instruction": "a"}, "fit alpaca and dolly; "), ({"text": "a"}, "are those of no known template; "),
    ({"text": "a", "label": 1}, "are those of no known template; "), ({"label": 1}, "are those of no known template; "),
])  # fmt: skip
def test_rows_without_answers_get_the_template_that_their_prompts_belong_to(tmp_path, bundled, row, name):
    """A4: and where it is not clear which one, the user is asked."""
    source = Source("", {"rows": (write_rows(tmp_path / "rows.jsonl", [row]),)})
    if name.endswith("; "):
        with pytest.raises(UserError, match=name) as error:
            find_template(None, source, bundled, asks=True)
        assert len(error.value.lines) == 1
        return
    template = find_template(None, source, bundled, asks=True)
    assert template.name == name
    assert len(read_prompts(source.files["rows"], template, bundled, WIDE).prompts) == 1


def test_the_room_for_prompts_is_what_the_answer_leaves(bundled):
    """Of --max_length where it leaves some, so that prompts are cut as in training; else of the model's positions."""
    assert room_of(1000, None, 256, "left") == Room(744, 744, "left")
    assert room_of(1000, 512, 3, "right") == Room(509, 997, "right")
    assert room_of(1000, 128, 256, "right") == Room(744, 744, "right")
    with pytest.raises(UserError, match="--max_new_tokens 1000: the model has 1000 positions, expected fewer tokens"):
        room_of(1000, None, 1000, "right")


@pytest.mark.slow
def test_a_question_to_a_real_model_has_the_ids_of_transformers(smollm2):
    """C12, C13, C14: SmolLM2's own chat template, with the system turn that it inserts."""
    transformers = pytest.importorskip("transformers")
    tokenizer = loaded(smollm2)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    chat = find_template("chat", Source("", {}), tokenizer, asks=True)
    for text in ["Tell me about Alpacas.", "naïve 映画 🎬\n", "[[x]] {y}"]:
        asked = [{"role": "user", "content": text}]
        ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert one_prompt(chat, text, tokenizer, WIDE).ids == ids
