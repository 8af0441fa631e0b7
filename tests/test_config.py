"""Shares typed on the command line."""

import pytest

from elastic_lm import flags


@pytest.mark.parametrize(("text", "wrong"), [("abc", "'abc'"), ("0", "0"), ("nan", "nan"), ("0.9,x", "'x'")])
def test_what_is_no_share_is_named(capsys: pytest.CaptureFixture[str], text: str, wrong: str) -> None:
    _, commands = flags.build_parsers()
    with pytest.raises(SystemExit):
        commands["quickstart"].parse_args(["--targets", text])
    assert f"argument --targets: {wrong} is not a share" in capsys.readouterr().err
