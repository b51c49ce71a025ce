"""What a failed command says."""

import re

import pytest

Captured = pytest.CaptureFixture[str]


def complaint(capsys: Captured) -> str:
    """The one message of a failed command, after checking that a person can read it."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert "unexpected failure" not in captured.err
    assert len(re.findall(r"^error: \S", captured.err, re.MULTILINE | re.IGNORECASE)) == 1, captured.err
    return captured.err
