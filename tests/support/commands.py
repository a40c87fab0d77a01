"""The command `deltadiff`, called from tests."""

from deltadiff.__main__ import main


def refused(capsys, *argv) -> str:
    """The one line on stderr of a command that exits with 2."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("deltadiff") and "Traceback" not in err
    return err
