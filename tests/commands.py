"""What the tests of commands share."""
from __future__ import annotations

from click.testing import CliRunner, Result

from timm_spot.cli import main


def run(*arguments: object) -> Result:
    """The result of `timm-spot` with these arguments."""
    return CliRunner().invoke(main, [str(a) for a in arguments])
