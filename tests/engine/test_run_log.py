"""What a run says on the console and in log.txt."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

from mtbert.engine.run_log import logging_to
from mtbert.errors import UserError

logger = logging.getLogger("mtbert.engine.somewhere")


def test_short_here_with_the_time_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path / "log.txt") as run_logger:
        run_logger.info("step %d", 3)
        logger.warning("odd: ä")
        logger.debug("not shown")
    logger.info("after the end")
    assert capsys.readouterr().out == "step 3\nwarning: odd: ä\n"
    first, second = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO    step 3", first)
    assert re.fullmatch(r".{19} WARNING odd: ä", second)


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with logging_to(tmp_path / "log.txt"):
            logger.info(text)
    assert [line[28:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]


def test_python_warnings_are_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with logging_to(tmp_path / "log.txt"):
            warnings.warn("a constant prediction", RuntimeWarning, stacklevel=1)
    line = (tmp_path / "log.txt").read_text()
    assert re.search(r"WARNING a constant prediction \(RuntimeWarning, .*test_run_log.py:\d+\)\n$", line)
    captured = capsys.readouterr()
    assert captured.out.count("a constant prediction") == 1
    assert captured.err == ""


def test_nothing_stays_changed(tmp_path: Path) -> None:
    root = logging.getLogger("mtbert")
    before = (root.level, list(root.handlers), root.propagate, warnings.showwarning)

    class Failed(Exception):
        pass

    def run() -> None:
        with logging_to(tmp_path / "log.txt"):
            assert root.level == logging.INFO
            raise Failed

    with pytest.raises(Failed):
        run()
    assert (root.level, list(root.handlers), root.propagate, warnings.showwarning) == before


def test_a_line_does_not_cut_through_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with logging_to(None), tqdm(total=10, file=screen, mininterval=0, ncols=40) as bar:
        bar.update(3)
        logger.info("a line of its own")
        bar.update(1)
    # Where the line begins, the bar has been wiped out: only blanks since the last carriage return.
    before, _, after = screen.getvalue().partition("a line of its own\n")
    assert before.rpartition("\r")[2].strip() == ""
    assert "\r" in before
    assert "30%" in after.partition("40%")[0], "the bar was not drawn again below the line"


def test_a_console_that_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    with logging_to(tmp_path / "log.txt"):
        logger.info("still in the file")
    assert "still in the file" in (tmp_path / "log.txt").read_text()


def test_a_full_disk_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with logging_to(tmp_path / "log.txt"):
        for number in range(3):
            logger.info("line %d", number)
    captured = capsys.readouterr()
    assert captured.out == "line 0\nline 1\nline 2\n"
    assert captured.err.count("cannot be written") == 1
    assert "No space left" in captured.err
    assert "Traceback" not in captured.err


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"log.txt cannot be written: No such file"),
        logging_to(tmp_path / "missing" / "log.txt"),
    ):
        pass
