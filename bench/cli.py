"""The console script ``fedgram``: the commands of ``bindings.cli``, and ``demo`` and ``bench`` of this room."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line; without typer or rich, print the line that installs them."""
    gc.disable()  # what the imports make lives to the end: walking it again and again takes a third of a short command
    try:
        from ._commands import app
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):
            raise
        sys.exit(f"fedgram: {error}")
    gc.freeze()
    gc.enable()
    app(prog_name="fedgram")


if __name__ == "__main__":
    main()
