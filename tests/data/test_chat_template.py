"""The prompt that is trained against the one that is served: the chat template that a folder has, and the one that an
export gets. The oracle is transformers' apply_chat_template."""

import json
from pathlib import Path

import pytest
from samples import BUNDLED, REAL, loaded, write_rows
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Codec
from tokenizers import decoders, models, pre_tokenizers, processors

from data import load_data
from llama.boundary.errors import UserError
from llama.data import chat_template
from llama.data.chat import CONTROL_TOKENS, LAYOUTS, Chat, find_chat, find_served_chat, layout_of
from llama.data.chat_template import ChatTemplate, Inserted, prompt_ids, read_chat_template
from llama.data.conversation import read_turns
from llama.data.encoding import encode_rows
from llama.data.sources import DataSettings
from llama.data.tokenizer import Tokenizer
from llama.data.tokenizer_files import load_tokenizer
from tests.data.test_tokenizer import llama2_style, train_sentencepiece, write

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n' + 'You are a helper<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA3 = (  # as that of Llama 3.1, whose date stays, and of Llama 3.2, which asks for the date
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n{{ 'Today Date: ' + DATE + '\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{% generation %}{{ '<|eot_id|>' }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = LLAMA3.replace("DATE", "'26 Jul 2024'")
LLAMA32 = LLAMA3.replace("DATE", "strftime_now('%d %b %Y')")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CHATML, HEADERS = CONTROL_TOKENS["chatml"], CONTROL_TOKENS["llama3"]
USER, ANSWER = {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi!"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALKS = [[USER, ANSWER], [SYSTEM, USER, ANSWER], [SYSTEM, USER, ANSWER, USER | {"content": "Naïve {{x}} 映画"}, ANSWER]]


def folder_with(path: Path, template: str | list | None, control: tuple[str, ...] = (), bos: bool = False) -> Path:
    """A folder with a byte-level tokenizer.json, these control tokens, and this chat template."""
    path.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    codec = Codec(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = decoders.ByteLevel()
    codec.add_special_tokens(["<s>", "</s>", *control])
    if bos:
        begin = codec.token_to_id("<s>")
        codec.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    codec.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def served(folder: Path, talk: list[dict], template: str | None = None) -> list[int]:
    """The ids of the prompt of the last answer, as transformers makes them."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    options = {"chat_template": template} if template else {}
    return tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=False, **options)


def trained(chat: Chat, tokenizer: Tokenizer, talk: list[dict]) -> list[int]:
    """The ids of an example that come before its last answer."""
    only_last = [m | {"train": False} if m["role"] == "assistant" else m for m in talk[:-1]] + talk[-1:]
    (example,) = encode_rows([chat.render({"messages": only_last}, "here")[0]], tokenizer, 10**6, "right")
    return example.ids[: example.is_answer.index(True)]


def chat_of(folder: Path, tmp_path: Path, *talks: list[dict], layout="chat", system=None) -> tuple[Chat, Tokenizer]:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks or TALKS])
    tokenizer = load_tokenizer(folder)
    return find_chat(layout, system, tokenizer, [path]), tokenizer


# What is exported


INSERTED = [Inserted("", ""), Inserted('Say "\\n{{ x }}" %}\n\'é映\' 100 %', ""), Inserted("Today.\n\n", "Today.\n\n")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bos", [True, False])
def test_the_exported_chat_template_writes_the_prompt_that_was_trained(tmp_path, layout, bos):
    """C12, C13, C14: the ids that transformers makes, with and without a system turn, BOS included."""
    folder = folder_with(tmp_path / "model", None, CONTROL_TOKENS.get(layout, ()), bos)
    tokenizer = load_tokenizer(folder)
    for inserted in INSERTED:
        chat = Chat(layout, inserted)
        for talk in [*TALKS, [SYSTEM | {"content": " "}, USER, ANSWER], [USER | {"content": " spaced\n"}, ANSWER]]:
            found = served(folder, talk, chat.chat_template(tokenizer))
            assert found == trained(chat, tokenizer, talk), (inserted, talk)
            assert found.count(tokenizer.control_id("<s>")) == bos * (1 if layout != "llama2" else len(talk) // 2)


@pytest.mark.slow
@pytest.mark.parametrize("name, layout", [("smollm2", "chatml"), ("smollm2", "zephyr"), ("smollm2", "prompter")])
def test_the_exported_chat_template_of_a_real_tokenizer(assets, name, layout):
    """C12: with merges, which could join what is encoded apart."""
    tokenizer = loaded(assets / REAL[name])
    for inserted in INSERTED:
        chat = Chat(layout, inserted)
        for talk in TALKS:
            assert served(assets / REAL[name], talk, chat.chat_template(tokenizer)) == trained(chat, tokenizer, talk)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_end_of_a_turn_is_the_last_label_of_an_answer(tmp_path, layout):
    """C15: at which an export must stop."""
    tokenizer = load_tokenizer(folder_with(tmp_path / "model", None, CONTROL_TOKENS.get(layout, ())))
    chat = Chat(layout)
    (example,) = encode_rows([chat.render({"messages": TALKS[0]}, "here")[0]], tokenizer, 10**6, "right")
    labels = [id for id, is_answer in zip(example.ids, example.is_answer, strict=True) if is_answer]
    assert chat.end_of_turn(tokenizer) == labels[-1]


# What a folder says


LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FITTING = {"chatml": SMOLLM2, "llama3": LLAMA31, "zephyr": ZEPHYR, "llama2": LLAMA2}


@pytest.mark.parametrize("layout", ["llama3", *(pytest.param(layout, marks=pytest.mark.slow) for layout in FITTING
                                               if layout != "llama3")])  # fmt: skip
def test_the_layout_is_the_one_that_writes_what_the_folders_template_writes(tmp_path, layout):
    """Whatever other control tokens the tokenizer has."""
    folder = folder_with(tmp_path / "model", FITTING[layout], (*CHATML, *HEADERS), bos=True)
    tokenizer = load_tokenizer(folder)
    assert layout_of(tokenizer, read_chat_template(tokenizer)) == layout


@pytest.mark.parametrize("template, control, bos", [
    (SMOLLM2, CHATML, False), (LLAMA31, HEADERS, True),
    pytest.param(ZEPHYR, (), False, marks=pytest.mark.slow), pytest.param(LLAMA2, (), True, marks=pytest.mark.slow),
], ids=["smollm2", "llama3.1", "zephyr", "llama2"])
def test_with_the_system_turn_of_the_folder_the_trained_ids_are_the_served_ones(tmp_path, template, control, bos):
    """C12: --system default, for conversations with and without a system turn; no note is left."""
    folder = folder_with(tmp_path / "model", template, control, bos)
    chat, tokenizer = chat_of(folder, tmp_path, system="default")
    assert not chat.notes
    for talk in TALKS:
        assert trained(chat, tokenizer, talk) == served(folder, talk)
        assert served(folder, talk, chat.chat_template(tokenizer)) == served(folder, talk)


def test_a_system_turn_that_only_the_folders_template_inserts_is_told_with_both_prompts(tmp_path):
    folder = folder_with(tmp_path / "model", SMOLLM2, CHATML)
    chat, tokenizer = chat_of(folder, tmp_path)
    assert trained(chat, tokenizer, TALKS[0]) != served(folder, TALKS[0])
    (note,) = chat.notes
    assert "1 of the first 3 prompts" in note and "rows.jsonl:1: " in note and "\n" not in note
    assert r"trained as '<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n'" in note
    assert r"served as '<|im_start|>system\nYou are a helper<|im_end|>\n<|im_start|>user\nHello" in note
    assert "--system default" in note
    assert "--system default" not in chat_of(folder, tmp_path, system="none")[0].notes[0]
    assert not chat_of(folder, tmp_path, TALKS[1])[0].notes


def test_a_date_cannot_be_trained_and_is_told(tmp_path):
    folder = folder_with(tmp_path / "model", LLAMA32, HEADERS)
    chat, _ = chat_of(folder, tmp_path)
    assert chat.name == "llama3" and "today's date, which cannot be trained" in chat.notes[0]
    with pytest.raises(UserError, match="--system default: .* writes today's date, which cannot be trained"):
        chat_of(folder, tmp_path, system="default")


def test_a_template_that_writes_no_bos_is_told(tmp_path):
    """C14: ours has one."""
    chat, _ = chat_of(folder_with(tmp_path / "model", ZEPHYR, bos=True), tmp_path)
    assert chat.name == "zephyr" and r"trained as '<s><|user|>\n" in chat.notes[0]
    assert r"served as '<|user|>\n" in chat.notes[0]


def test_the_same_text_of_other_ids_is_told(tmp_path):
    """C12, C18: transformers puts SentencePiece's space behind every control token, too; nobody else does."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(BUNDLED.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token }}" + ZEPHYR}))
    chat, _ = chat_of(folder, tmp_path, TALKS[1])
    assert chat.name == "zephyr" and "the text is the same, '<s><|system|>\\nBe" in chat.notes[0]
    assert "ids are not" in chat.notes[0]


def test_a_template_is_rendered_as_transformers_does_it(tmp_path):
    """Without the spaces before a block and the line break behind it; JSON keeps its letters."""
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}\n    {% if true %}\n{{ m['content'] | tojson }}\n    {% endif %}\n{% endfor %}"
    folder = folder_with(tmp_path / "model", template)
    (written,) = read_chat_template(load_tokenizer(folder)).write([(read_turns({"messages": TALKS[2]}, "here"), None)])
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert written.text == oracle.apply_chat_template(TALKS[2], tokenize=False) and "映画" in written.text


def test_a_difference_far_behind_the_start_of_a_prompt_is_shown(tmp_path):
    """Not the first characters of both prompts, which are the same."""
    template = SMOLLM2.replace("assistant\n' }}{% endif", "assistant\nSure' }}{% endif")
    talk = [SYSTEM, USER | {"content": "word " * 200}, ANSWER]
    (note,) = chat_of(folder_with(tmp_path / "model", template, CHATML), tmp_path, talk, layout="chatml")[0].notes
    assert r"assistant\n', served as ..." in note and r"assistant\nSure'" in note


def test_of_two_control_tokens_that_a_prompt_may_spell_the_longer_one_is_compared(tmp_path):
    """As transformers finds them, where "<go>" begins "<go>!"."""
    (tmp_path / "tokenizer.model").write_bytes(BUNDLED.read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<go>": 1280, "<go>!": 1281}))
    config = {"chat_template": ZEPHYR, "additional_special_tokens": ["<go>", "<go>!"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = read_chat_template(load_tokenizer(tmp_path)).ids("<go>!<go>")
    assert ids == [1281, 1280]


@pytest.mark.parametrize("legacy", [None, False, True])
def test_a_prompt_is_compared_by_the_ids_that_transformers_gives_it(tmp_path, legacy):
    """C12: of a tokenizer.model, and of the tokenizer.json that is made of one, where only `legacy` puts a space behind
    control tokens. Without that key there is none."""
    transformers = pytest.importorskip("transformers")
    model = train_sentencepiece()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": legacy}
    settings = {name: value for name, value in settings.items() if value is not None}
    ours = write(tmp_path / "model", tokenizer__model=model, tokenizer_config__json=settings)
    document = llama2_style(SentencePieceProcessor(model_proto=model))
    write(tmp_path / "json", tokenizer__json=document, tokenizer_config__json=settings)
    oracle = transformers.LlamaTokenizer.from_pretrained(tmp_path / "json")
    templates = [ChatTemplate("", load_tokenizer(folder)) for folder in (ours, tmp_path / "json")]
    for text in ("<s>the film</s>\nthe film</s>the film", "the film</s> the"):
        expected = oracle(text, add_special_tokens=False)["input_ids"]
        assert [template.ids(text) for template in templates] == [expected] * 2


def test_a_conversation_that_the_template_refuses_is_told(tmp_path):
    template = SMOLLM2.replace("{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no sys\ntem') }}"
                               "{% endif %}{% for", 1)
    chat, _ = chat_of(folder_with(tmp_path / "model", template, CHATML), tmp_path, TALKS[1])
    assert "it refuses the conversation (TemplateError no sys" in chat.notes[0]


def test_a_template_of_no_layout_is_refused_unless_a_layout_is_named(tmp_path):
    folder = folder_with(tmp_path / "model", MISTRAL)
    with pytest.raises(UserError) as error:
        chat_of(folder, tmp_path)
    assert r"none of our layouts (it writes '<s>[INST] Hello [/INST] Hi</s>[INST] Bye" in str(error.value)
    assert "--template takes one" in str(error.value)
    chat, _ = chat_of(folder, tmp_path, TALKS[2][1:], layout="llama2")
    assert chat.name == "llama2" and "trained as" in chat.notes[0] and "served as" in chat.notes[0]
    folder_with(tmp_path / "model", MISTRAL, CHATML)
    assert chat_of(folder, tmp_path)[0].name == "chatml", "whose control tokens are there"


def test_a_folder_without_a_chat_template_is_told_where_nothing_else_says_the_layout(tmp_path):
    folder = folder_with(tmp_path / "model", None)
    assert "has no chat template" in chat_of(folder, tmp_path, TALKS[0])[0].notes[0]
    assert not chat_of(folder, tmp_path, TALKS[0], layout="llama2")[0].notes
    assert not chat_of(folder_with(tmp_path / "chatml", None, CHATML), tmp_path)[0].notes
    with pytest.raises(UserError, match="--system default: .* has no chat template to read"):
        chat_of(folder, tmp_path, system="default")


def test_a_text_that_is_only_spaces_is_no_system_turn(tmp_path):
    with pytest.raises(UserError, match="--system ' ': is empty"):
        chat_of(folder_with(tmp_path / "model", None), tmp_path, system=" ")


def test_the_text_of_system_is_the_turn_of_conversations_that_have_none(tmp_path):
    chat, tokenizer = chat_of(folder_with(tmp_path / "model", None, HEADERS), tmp_path, system=" Be brief.\n")
    assert chat.system == "Be brief." and chat.source != Chat("llama3").source, "the cache's key"
    assert trained(chat, tokenizer, TALKS[0]) == trained(Chat("llama3"), tokenizer, TALKS[1])
    assert trained(chat, tokenizer, TALKS[2]) == trained(Chat("llama3"), tokenizer, TALKS[2])


def test_the_templates_file_comes_before_the_configs_and_the_default_before_others(tmp_path):
    """As transformers reads them."""
    folder = folder_with(tmp_path / "model", [{"name": "tool_use", "template": MISTRAL},
                                              {"name": "default", "template": SMOLLM2}], CHATML)
    assert read_chat_template(load_tokenizer(folder)).source == SMOLLM2
    (folder / "chat_template.jinja").write_text(ZEPHYR)
    assert read_chat_template(load_tokenizer(folder)).source == ZEPHYR
    assert read_chat_template(load_tokenizer(folder_with(tmp_path / "none", None))) is None
    older = folder_with(tmp_path / "older", None)
    (older / "chat_template.json").write_text(json.dumps({"chat_template": ZEPHYR}))
    assert read_chat_template(load_tokenizer(older)).source == ZEPHYR


HOSTILE = {
    "a long loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "of CPU or"),
    "much memory": ("{{ 'x' * 10000000000 }}", "MemoryError"),
    "much text": ("{{ 'x' * 5000000 }}", "it writes 5000000 characters"),
    "no Jinja": ("{% for %}", "TemplateSyntaxError"),
    "an escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "half a character": ("{{ '\ud800' }}", "UnicodeEncodeError"),
    "a file": ("{% include '/etc/passwd' %}", "TypeError no loader"),
    "a terminal's language": ("{{ raise_exception('\x1b[2J') }}", "TemplateError"),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow][: case != "much memory"])
                                  for case in HOSTILE])
def test_a_hostile_template_neither_hangs_nor_fills_the_memory_nor_stops_the_run(tmp_path, monkeypatch, case):
    """R16: it is told that it cannot be compared; without a layout on purpose, it is refused."""
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    template, expected = HOSTILE[case]
    folder = folder_with(tmp_path / "model", template)
    (note,) = chat_of(folder, tmp_path, layout="llama2")[0].notes
    assert "cannot be compared: " in note and expected in note
    with pytest.raises(UserError, match="none of our layouts") as error:
        chat_of(folder, tmp_path)
    assert "\x1b" not in error.value.lines[0]


def test_a_run_tells_the_difference_and_is_bound_to_the_system_turn(tmp_path, own_cache):
    """R7: a resumed run must have the same one; other text is encoded anew."""
    tokenizer = load_tokenizer(folder_with(tmp_path / "model", SMOLLM2, CHATML))
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALKS[0]}] * 2)
    found = {}
    for system in (None, "default", "Be kind."):
        data = load_data(DataSettings(data=str(path), system=system, test_fraction=0.0), tokenizer)
        found[system] = data
        assert [note for note in data.notes() if note.startswith("PROMPT: ")] == list(data.template.notes)
    assert len(found[None].template.notes) == 1 and not found["default"].template.notes
    assert [data.identity()["system"] for data in found.values()] == [None, "You are a helper", "Be kind."]
    assert len({data.train.fingerprint for data in found.values()}) == 3
    prompt = served(tokenizer.path, TALKS[0])
    assert found["default"].train[0][0].tolist()[: len(prompt)] == prompt


@pytest.mark.parametrize("template", [7, {"a": 1}, [7], "x" * (1 << 21)], ids=["number", "object", "list", "long"])
def test_what_is_no_template_is_refused(tmp_path, template):
    with pytest.raises(UserError, match="chat_template"):
        read_chat_template(load_tokenizer(folder_with(tmp_path / "model", template)))


ZEPHYR_AND_OTHER = [{"name": "default", "template": ZEPHYR}, {"name": "../x", "template": "y"}]


def test_a_template_that_no_export_could_hold_stops_a_run_before_it_trains(tmp_path):
    """R13: the name of another template than the one that is used, too. And a git-lfs pointer is no template."""
    folder = folder_with(tmp_path / "model", ZEPHYR_AND_OTHER)
    with pytest.raises(UserError, match=r"tokenizer_config.json: names the chat template '../x', .*; rename it there"):
        read_chat_template(load_tokenizer(folder))
    pointer = folder_with(tmp_path / "pointer", ZEPHYR)
    (pointer / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n")
    with pytest.raises(UserError, match="chat_template.jinja: is a git-lfs pointer, .*`git lfs pull`"):
        read_chat_template(load_tokenizer(pointer))


def test_prompts_are_the_beginnings_of_examples(tmp_path):
    """C13: what is compared with a template's prompt is what stands before the answer of an example."""
    for layout in LAYOUTS:
        tokenizer = load_tokenizer(folder_with(tmp_path / layout, None, CONTROL_TOKENS.get(layout, ()), bos=True))
        for talk in TALKS:
            turns = read_turns({"messages": talk}, "here")[:-1]
            assert prompt_ids(layout, turns, tokenizer) == trained(Chat(layout), tokenizer, talk)


# A model that is asked, and not trained


def test_a_model_is_asked_with_the_system_turn_that_its_own_chat_template_inserts(tmp_path):
    """C12: the ids of transformers; --system says otherwise."""
    folder = folder_with(tmp_path / "model", SMOLLM2, CHATML)
    tokenizer = load_tokenizer(folder)
    talk = [USER, ANSWER]
    chat = find_served_chat("chat", None, tokenizer, [])
    assert trained(chat, tokenizer, talk) == served(folder, talk) and not chat.notes
    assert find_served_chat("chat", "none", tokenizer, []).system is None
    assert find_served_chat("chat", "Be brief.", tokenizer, []).system == "Be brief."
    assert find_chat("chat", None, tokenizer, []).system is None  # what is trained says so by a flag


def test_where_the_own_system_turn_cannot_be_written_a_note_says_so(tmp_path):
    tokenizer = load_tokenizer(folder_with(tmp_path / "model", LLAMA32, HEADERS, bos=True))
    chat = find_served_chat("chat", None, tokenizer, [])
    assert chat.system is None and len(chat.notes) == 1
    assert chat.notes[0].startswith("no system turn is inserted; ") and "writes today's date" in chat.notes[0]
    plain = load_tokenizer(folder_with(tmp_path / "plain", None, CHATML))
    assert find_served_chat("chat", None, plain, []).notes == []


def test_rows_that_end_with_the_user_are_compared_with_the_chat_template_too(tmp_path):
    """C12: the prompt that a row asks is compared, whether its answer is there or not."""
    tokenizer = load_tokenizer(folder_with(tmp_path / "model", SMOLLM2, CHATML))
    for rows in ([[USER]], [[USER, ANSWER]]):
        path = write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in rows])
        (note,) = find_chat("chat", "none", tokenizer, [path]).notes
        assert "1 of the first 1 prompts" in note and "You are a helper" in note
