"""The entry point: runs the command line and turns whatever happens into an exit code."""

from __future__ import annotations

import os
import sys

from streamconv._version import __version__
from streamconv.errors import StreamconvError


def main() -> None:
    """Run the command line; never returns."""
    # What we make we must be able to open again; others get what the user's mask gives them.
    os.umask(os.umask(0o077) & ~0o700)
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        sys.stdout.write(f"streamconv {__version__}\n")
        return 0
    from streamconv.system.signals import heeded

    debug = "--debug" in arguments
    try:
        with heeded():
            from streamconv.cli.commands import run

            return run(arguments)
    except SystemExit as end:
        return _exit_code(end)
    except StreamconvError as error:
        if debug:
            raise
        return _report(error, arguments)
    except BrokenPipeError:
        # Whoever read our output has gone; the flush at exit must not complain about it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (OSError, MemoryError) as error:
        # A read-only disk, a folder of somebody else, a limit: the user's to mend, no fault of ours.
        if debug:
            raise
        return _report(StreamconvError.of_system(error), arguments)
    except Exception as error:
        if debug:
            raise
        # The last resort: a line, never a traceback.
        from streamconv.cli.output import tell

        tell(f"error: internal: {type(error).__name__}: {error}")
        tell("  next: run the same command with --debug and report what it prints")
        return 1


def _report(error: StreamconvError, arguments: list[str]) -> int:
    from streamconv.cli.output import render_error, say_json, tell

    if "--json" in arguments:
        say_json({"event": "error", **error.to_json()})
    tell(render_error(error))
    return error.exit_code


def _exit_code(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    sys.stderr.write(f"error: {end.code}\n")
    return 1


if __name__ == "__main__":
    main()
