from __future__ import annotations

import pytest

from registry.command_parser import CommandParser


def parser() -> CommandParser:
    parser = CommandParser(prog="python -m thing")
    parser.add_argument("--port", type=int)
    commands = parser.add_subparsers(dest="command")
    keys = commands.add_parser("keys")
    actions = keys.add_subparsers(dest="action", required=True)
    actions.add_parser("create").add_argument("--name")
    return parser


@pytest.mark.parametrize(
    "arguments",
    ["--typo 1", "--typo=1", "--port 1 --typo 1", "keys --typo 1", "keys --typo create", "keys create --typo 1"],
)
def test_an_unknown_flag_is_named(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parser().parse_args(arguments.split())
    assert exited.value.code == 2
    assert "unrecognized arguments: --typo" in capsys.readouterr().err


def test_arguments_are_those_of_the_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["thing", "--typo", "1"])
    with pytest.raises(SystemExit):
        parser().parse_args()
    assert "unrecognized arguments: --typo" in capsys.readouterr().err


def test_everything_else_is_argparses(capsys: pytest.CaptureFixture[str]) -> None:
    options = parser().parse_args(["--por", "1", "keys", "create", "--name", "--a b"])
    assert (options.port, options.command, options.action, options.name) == (1, "keys", "create", "--a b")
    assert parser().parse_args(["--port=-1"]).port == -1
    with pytest.raises(SystemExit):
        parser().parse_args(["1"])
    assert "invalid choice: '1'" in capsys.readouterr().err


def test_what_the_list_says_of_a_command_begins_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    outer = CommandParser(prog="python -m thing")
    outer.add_subparsers().add_parser("list", help="print all of them")
    with pytest.raises(SystemExit):
        outer.parse_args(["list", "--help"])
    assert "Print all of them." in capsys.readouterr().out
