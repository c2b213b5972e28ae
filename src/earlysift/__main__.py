"""``earlysift`` and ``python -m earlysift``: the command line, or how to install what it needs."""

import io
import signal
import sys
import traceback

from earlysift import helps


def main() -> int:
    """Run the command line; returns the exit code."""
    # These need none of the packages that the commands need, and none of the time to import them.
    answer = _ANSWERS.get(sys.argv[1]) if len(sys.argv) == 2 else None
    if answer is not None:
        print(answer())
        return 0
    try:
        from earlysift import cli
    except ImportError as error:
        print(
            f"earlysift: the command line needs more packages ({error}): pip install 'earlysift[all]'.", file=sys.stderr
        )
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a folder need not be text
    # SIGTERM from a scheduler leaves a readable partial result too, even in a job that ignores Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return cli.main(prepare=_keep_memory)
    except Exception as error:
        traceback.print_exc()
        print(
            f"earlysift: unexpected {type(error).__name__}. This is a bug: please open an issue with the lines above.",
            file=sys.stderr,
        )
        return 1


def _keep_memory() -> None:
    from earlysift import environment  # which needs torch

    environment.keep_memory()


def _versions() -> str:
    from earlysift import versions

    return versions.line()


_ANSWERS = {"--help": helps.overview, "-h": helps.overview, "--version": _versions}


if __name__ == "__main__":
    sys.exit(main())
