"""The console script ``fedgram``: the commands of ``bindings.cli``, and ``demo`` and ``bench`` of this room."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line; without typer or rich, print the line that installs them.

    What typer prints itself, help and usage, may find no room either: that is one line, as it is in the commands.
    """
    try:
        _run()
    except KeyboardInterrupt:  # while modules are imported; afterwards typer sees it
        sys.exit("Aborted.")
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        sys.exit(f"fedgram: {error.strerror}")


def _run() -> None:
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
