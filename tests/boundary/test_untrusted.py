"""A folder that a stranger may have made: only its own files are read, and only up to a size."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.boundary import untrusted
from llama.boundary.errors import UserError
from llama.boundary.untrusted import inside, read_json


@pytest.fixture
def folder(tmp_path):
    """A folder with one good file, beside a secret."""
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "good.json").write_text('{"a": 1}')
    return folder


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    (line,) = error.value.lines
    assert line == str(error.value) and line.isprintable() and 0 < len(line) < 2000
    return line


def test_a_file_of_the_folder_is_found_with_links_followed(folder):
    """R12: a link may stay inside; the folder itself may be reached through a link."""
    assert inside(folder, "good.json", ".json") == folder / "good.json"
    (folder / "link.json").symlink_to("good.json")
    assert inside(folder, "link.json", ".json") == folder / "good.json"
    (folder.parent / "elsewhere").symlink_to(folder)
    assert inside(folder.parent / "elsewhere", "good.json", "") == folder / "good.json"


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "x/y.json", "..\\secret.json", "good.json\0",
                                  "\x1b[31m.json", "\ud800.json", "good.bin", "good.JSON"], ids=ascii)  # fmt: skip
def test_only_a_plain_name_with_the_right_ending_is_looked_for(folder, name):
    """R12: nothing outside is even asked for."""
    message = refusal(inside, folder, name, ".json")
    assert message.startswith(f"{folder}: names ") and message.endswith(", expected a plain *.json file name")


@pytest.mark.parametrize("name", ["", ".", "..", "absent.json", "folder.json", "pipe.json", "loop.json", "y" * 5000])
def test_what_is_no_file_is_refused(folder, name):
    """R12, R13: neither a folder, nor a pipe that would be waited on for ever, nor a link to itself."""
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "loop.json").symlink_to("loop.json")
    message = refusal(inside, folder, name, "")
    assert "missing or not a file, expected a file of this folder" in message or name == ".." and "a link to" in message


@pytest.mark.parametrize("target", ["../secret.json", "/etc/passwd", "../model2/good.json"])
def test_a_link_that_leaves_the_folder_is_refused(folder, target):
    """R12: also where the neighbour's name begins as this folder's does."""
    (folder.parent / "model2").mkdir()
    (folder.parent / "model2/good.json").write_text("{}")
    (folder / "link.json").symlink_to(target)
    message = refusal(inside, folder, "link.json", ".json")
    assert message.startswith(f"{folder / 'link.json'}: a link to ") and "expected a file inside the folder" in message
    assert refusal(read_json, folder, "link.json") == message


def test_the_hubs_own_links_are_followed(tmp_path):
    """R12: REPO/snapshots/REVISION/name -> REPO/blobs/HASH, and no other way out."""
    snapshot = tmp_path / "repo/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "repo/blobs").mkdir()
    (tmp_path / "repo/blobs/hash").write_text('{"a": 1}')
    (tmp_path / "repo/other").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "other.json").symlink_to("../../other")
    assert read_json(snapshot, "config.json") == {"a": 1}
    assert "a link to" in refusal(read_json, snapshot, "other.json")


def test_the_object_in_a_file_is_read(folder):
    assert read_json(folder, "good.json") == {"a": 1} == read_json(str(folder), "good.json")


@pytest.mark.parametrize("content, words", [
    (b"", "Expecting value: line 1 column 1 (char 0)"),
    (b'{"a": 1', "Expecting ',' delimiter: line 1 column 8 (char 7)"),
    (b"\xff\xfe{}", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    (b"[" * 100_000, "maximum recursion depth exceeded"),
    (b'{"a": 1' + b"0" * 5000 + b"}", "Exceeds the limit (4300 digits) for integer string conversion"),
    (b"[]", "found list"), (b"null", "found NoneType"), (b"3", "found int"), (b'"\\u001b[31m"', "found str"),
    (b'{"a": 1, "a": 2}', "a name comes twice"), (b'{"b": {"a": 1, "a": 1}}', "a name comes twice"),
], ids=range(11))  # fmt: skip
def test_a_file_that_holds_no_object_is_refused_by_its_path(folder, content, words):
    """R13."""
    (folder / "bad.json").write_bytes(content)
    message = refusal(read_json, folder, "bad.json")
    assert message.startswith(f"{folder / 'bad.json'}: {words}") and message.endswith(", expected a JSON object")


def test_a_file_that_is_too_large_is_not_read(folder, monkeypatch):
    """R13: memory is taken up to a bound, whatever a file holds."""
    monkeypatch.setattr(untrusted, "LARGEST_JSON", 100)
    (folder / "large.json").write_text(json.dumps({"a": "x" * 91}))
    assert len((folder / "large.json").read_bytes()) == 100 and read_json(folder, "large.json")
    (folder / "large.json").write_text(json.dumps({"a": "x" * 92}))
    assert refusal(read_json, folder, "large.json") == f"{folder / 'large.json'}: more than 100 bytes"


def test_a_folder_whose_name_cannot_be_is_refused():
    """No path holds a NUL byte: the system's own functions raise ValueError for one."""
    with pytest.raises(UserError) as caught:
        read_json("a\0b", "config.json")
    assert caught.value.lines == ["a\\x00b/config.json: embedded null byte, expected a JSON object"]


def test_a_file_that_may_not_be_read_is_refused(folder, monkeypatch):
    def forbidden(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(untrusted, "open", forbidden, raising=False)
    expected = f"{folder / 'good.json'}: Permission denied, expected a JSON object"
    assert refusal(read_json, folder, "good.json") == expected


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_an_object_or_one_line(tmp_path_factory, content):
    """R13: plain noise, and any JSON value."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.json").write_bytes(content)
    try:
        assert isinstance(read_json(folder, "any.json"), dict)
    except UserError as error:
        (line,) = error.lines
        assert line.startswith(f"{folder / 'any.json'}: ") and "\n" not in str(error)
