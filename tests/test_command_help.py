"""What the commands say of themselves, and to a slip of the keyboard."""

import subprocess
import sys
from pathlib import Path

import pytest

from lampq_rt import quickstart
from tests.commands import run, succeed

MODEL = "test_vit"

COMMANDS = ("quickstart", "calibrate", "compile", "eval", "bench", "frontier", "tune", "profile", "inspect")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    output = succeed(command, "--help").output
    assert "Examples:" in output and f"lampq {command}" in output


def test_the_command_itself():
    code = [sys.executable, "-m", "lampq_rt.cli"]
    root = Path(__file__).resolve().parents[1]
    version = subprocess.run([*code, "--version"], capture_output=True, text=True, cwd=root, check=True)
    assert version.stdout.startswith("lampq_rt ")
    wrong = subprocess.run([*code, "inspect", "nowhere.plan"], capture_output=True, text=True, cwd=root, check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("calibrat",), "No such command 'calibrat'. Did you mean 'calibrate'?; what is allowed: "),
        (("bench", MODEL, "--bathc", "1"), "No such option: --bathc (Possible options: --batch, "),
        (("--loud",), "No such option: --loud; what is allowed: "),
        (("inspect",), "Missing argument"),
        (("compile", MODEL, "--out", "x.lampq"), "Missing option '--plan'; what is allowed: "),
        (("bench", MODEL, "--threads", "many"), "Invalid value for '--threads': "),
        (("calibrate", MODEL, "--images", "x", "--out", "y", "--seed", "-1"), "Invalid value for '--seed': "),
    ],
)
def test_a_slip_of_the_keyboard_is_one_line_that_names_the_help(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {said}") and result.stderr.endswith(" --help\n")


def words(output):
    """A help text without its frame."""
    return " ".join(output.replace("│", " ").split())


def test_help_says_what_is_so():
    bench_help = words(succeed("bench", "--help").output)
    assert "random ones" in bench_help and "peers (these three)" in bench_help and "8 by default" in bench_help
    calibrate_help = words(succeed("calibrate", "--help").output)
    assert "--mean-bits 4 --recipe fast+w" in calibrate_help and "less than half of the time" in calibrate_help
    assert "--mean-bits 4 --recipe fast+w" in quickstart.NEXT_STEPS
