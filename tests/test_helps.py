"""The overview of the command line says what its parser knows."""

import re

import pytest

from earlysift import cli, helps


def test_the_overview_has_a_line_for_every_command_of_the_parser_and_for_every_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    parsed = re.search(r"\{(.*?)\}", capsys.readouterr().out)[1].split(",")
    assert parsed == list(helps.COMMANDS)
    lines = helps.overview().splitlines()
    for name, text in helps.COMMANDS.items():
        assert [line.split(maxsplit=1)[1] for line in lines if line.split()[:1] == [name]] == [text.splitlines()[0]]
    for flag in ("-h, --help", "--version", "--print-completion"):
        assert sum(line.startswith(f"  {flag}") for line in lines) == 1
    assert max(map(len, lines)) <= 120
