"""``earlysift`` and ``python -m earlysift``: the command line, or a word on how to install it."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from earlysift import cli
    except ImportError as error:
        print(
            f"earlysift: the command line needs more packages ({error}): pip install 'earlysift[all]'.", file=sys.stderr
        )
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
