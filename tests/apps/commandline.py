"""Running the command line inside a test's process."""

from __future__ import annotations

import sys

import pytest

from vidkv.apps import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `vidkv ARGUMENTS`."""
    old = sys.argv
    sys.argv = ["vidkv", *arguments]
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
    finally:
        sys.argv = old
    printed = capsys.readouterr()
    return int(left.value.code or 0), printed.out, printed.err
