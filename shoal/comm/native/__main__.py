"""``python -m shoal.comm.native``: compile the C++ parts now, so that nobody waits for them later. Never fails."""

import sys

from shoal.comm.native import build


def main() -> None:
    if reason := build.why_not():
        print(f"shoal: goes without its compiled parts, more slowly: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
