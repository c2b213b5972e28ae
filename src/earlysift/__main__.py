"""``earlysift`` and ``python -m earlysift``: the command line, or a word on how to install it."""

import signal
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from earlysift import cli, environment
    except ImportError as error:
        print(
            f"earlysift: the command line needs more packages ({error}): pip install 'earlysift[all]'.", file=sys.stderr
        )
        return 2
    environment.keep_memory()
    # A scheduler's polite end (SIGTERM), also of a job that ignores Ctrl-C, leaves a readable partial result, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
