import subprocess
import sys
from pathlib import Path

import pytest

from registry.standard_output import printing

ROOT = Path(__file__).parents[2]


def test_what_is_printed_arrives(capfd: pytest.CaptureFixture[str]) -> None:
    with printing():
        print("a line")
    assert capfd.readouterr().out == "a line\n"


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    """Also where the last lines are still in the buffer then."""
    for count in (1, 100_000):
        code = f"from registry.standard_output import printing\nwith printing(): print('x\\n' * {count})"
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 0
