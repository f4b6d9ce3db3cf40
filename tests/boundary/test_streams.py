"""Whatever happens to stdout and stderr, or comes from the keyboard: who works on, who ends, and with which status."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llama.boundary.streams import Forgiving

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
    import sys
    from pathlib import Path
    from llama.boundary.command_line import run

    def main():
        for number in range(3):
            print("line", number, flush={flush})
            print("progress", number, file=sys.stderr)
        with open("result", "w") as file:  # would get the number of a stream that is closed
            print("last")
            file.write("whole")

    run(main, keep_going={keep_going})
"""


def outcome(folder: Path, keep_going: bool, flush: bool, redirected: str) -> tuple[int, str, bool]:
    """Exit status, what was said on stderr, and whether the program has written its file whole. Where stdout is not
    redirected, it is a pipe whose reader has gone."""
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM.format(keep_going=keep_going, flush=flush)))
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        ["bash", "-c", f"{sys.executable} {program} {redirected}"], cwd=folder, timeout=100, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=writer, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    result = folder / "result"
    written = result.exists() and result.read_text() == "whole"
    said = [line for line in ended.stderr.splitlines() if not line.startswith("progress")]
    return ended.returncode, " ".join(said), written


LOST = {"nobody reads": "", "full": "> /dev/full", "closed": ">&-", "both are closed": ">&- 2>&- <&-"}


@pytest.mark.parametrize("redirected", LOST.values(), ids=LOST)
@pytest.mark.parametrize("flush", [True, False], ids=["at once", "buffered"])
def test_a_program_whose_result_is_in_files_works_on_in_silence(tmp_path, flush, redirected):
    """Its status is that of its work: what it prints is only a report."""
    assert outcome(tmp_path, True, flush, redirected) == (0, "", True)


@pytest.mark.parametrize("case, status, said", [
    ("nobody reads", 141, ""), ("full", 2, "output: No space left on device"),
    ("closed", 2, "output: Bad file descriptor"),
    pytest.param("both are closed", 2, "", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_program_whose_result_is_printed_never_ends_with_status_0_when_it_is_lost(tmp_path, case, status, said):
    """And with no traceback: as other commands, in a pipe with the status of SIGPIPE."""
    for flush in (True, False):
        assert outcome(tmp_path, False, flush, LOST[case])[:2] == (status, said)


def test_ctrl_c_is_one_line_wherever_it_comes(tmp_path):
    """Also while a script imports torch: after its flags were read, before its main function is called."""
    for program in ("run(lambda: None); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
                    "run(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9)))"):
        listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job in the background ignores it
        text = f"import os, signal, time; {listen}; from llama.boundary.command_line import run; {program}"
        ended = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("keep_going", [True, False])
def test_no_program_ends_because_of_its_stderr(tmp_path, keep_going):
    """Nobody may be there to see its progress."""
    for redirected in ("2>/dev/full", "2>&-", "2> >(true)"):
        assert outcome(tmp_path, keep_going, True, f"{redirected} > out") == (0, "", True)
        assert (tmp_path / "out").read_text().splitlines() == ["line 0", "line 1", "line 2", "last"]
        (tmp_path / "result").unlink()


def test_what_a_slow_reader_has_no_room_for_is_written_later(tmp_path):
    """A write that was done in part says so: the rest is not taken for written."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    written = Forgiving(writer, "wb").write(bytes(1 << 20))
    assert 0 < written == len(os.read(reader, 1 << 20)) < 1 << 20
    os.close(reader)


def test_a_line_on_stderr_is_there_at_once(tmp_path):
    """Also where the process then ends without a farewell, as at a second Ctrl-C."""
    text = "import os, sys; from llama.boundary.command_line import run; " \
           "run(lambda: (print('told', file=sys.stderr), os._exit(3)))"
    ended = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=100,
                           env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert (ended.returncode, ended.stderr) == (3, "told\n")


def test_a_character_that_the_terminal_cannot_show_is_spelled_out():
    """It neither ends the program nor is it left out."""
    text = "from llama.boundary.command_line import run; run(lambda: print('caf\\xe9 \\u6620'))"
    ended = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=100,
                           env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stdout) == (0, r"caf\xe9 \u6620" + "\n")
