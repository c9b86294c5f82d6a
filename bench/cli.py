"""The console script ``fedgram``: the commands of ``bindings.cli``, and ``demo`` and ``bench`` of this room."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without typer or rich, print the line that installs them."""
    try:
        from ._commands import app
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):
            raise
        sys.exit(f"fedgram: {error}")
    app(prog_name="fedgram")


if __name__ == "__main__":
    main()
