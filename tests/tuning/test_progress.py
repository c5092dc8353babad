"""What a run shows: plain lines in a file, a bar on a terminal, nothing when disabled."""

import io

import pytest
from rich.console import Console

from fst_fast.tuning.progress import EpochRecord, ProgressReport

FIRST = EpochRecord(1, 0.123456, 0.98765, 0.01, -0.5, 2.0, 1.26)
LAST = EpochRecord(2, 12.5, 1.0, 0.0051, 0.25, 2.0, 1234.56)


def report(enabled=True, width=None, terminal=False, title="fst"):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    return ProgressReport(title, 2, enabled, console), console.file


@pytest.mark.parametrize("width", [None, 30, 200])
def test_a_file_gets_one_plain_line_per_epoch(width):
    progress, file = report(width=width)
    with progress:
        progress.epoch(FIRST)
        first = file.getvalue()
        progress.epoch(LAST)
    assert first == ("fst epoch 1/2  loss 0.123  accuracy 98.8 %  cosine -0.50  lr 0.0100  1.3 s\n")
    assert file.getvalue() == first + (
        "fst epoch 2/2  loss 12.500  accuracy 100.0 %  cosine +0.25  lr 0.0051  1234.6 s\n"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_notes_are_shown_word_for_word(terminal):
    progress, file = report(terminal=terminal, width=200, title="[x]")
    with progress:
        progress.note("stopped: NaN at [sample, row] [3, 4] [bold]now[/bold] [/]")
    assert "stopped: NaN at [sample, row] [3, 4] [bold]now[/bold] [/]" in file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_disabled_shows_nothing(terminal):
    progress, file = report(enabled=False, terminal=terminal)
    with progress:
        progress.epoch(FIRST)
        progress.note("a note")
    assert file.getvalue() == ""


def test_a_terminal_gets_a_bar():
    progress, file = report(terminal=True, width=200)
    with progress:
        progress.epoch(FIRST)
        progress.epoch(LAST)
    shown = file.getvalue()
    assert "\x1b[" in shown
    assert "2/2" in shown
    assert "loss 12.500  accuracy 100.0 %  cosine +0.25" in shown
    assert "epoch 1/2" not in shown


def test_the_bar_ends_with_the_block_also_after_an_exception():
    progress, _ = report(terminal=True)

    def interrupted():
        with progress:
            assert progress._bar.live.is_started
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not progress._bar.live.is_started


def test_by_default_it_writes_to_standard_error(capsys):
    with ProgressReport("ft", 3, enabled=True) as progress:
        progress.epoch(FIRST)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ft epoch 1/3  loss 0.123")
