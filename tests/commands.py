"""The commands as tests give them: in this process, what must end well and what must not."""

from __future__ import annotations

from typer.testing import CliRunner

from lampq_rt.cli import main


def run(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def succeed(*arguments: object):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fail(*arguments: object) -> str:
    """The one line on standard error of a command that must end with status 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0]
