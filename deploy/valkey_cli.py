"""The `ping` of valkey-cli, where there is none: `-h HOST -p PORT ping`."""

from __future__ import annotations

import argparse
import sys

from deploy.local import answers_ping


def main() -> int:
    """Exit with 0 if a Redis answers."""
    parser = argparse.ArgumentParser(prog="valkey-cli", add_help=False)
    parser.add_argument("-h", dest="host", default="127.0.0.1")
    parser.add_argument("-p", dest="port", default="6379")
    parser.add_argument("command", choices=["ping"])
    options = parser.parse_args()
    answers = answers_ping(f"redis://{options.host}:{options.port}")
    print("PONG" if answers else "no answer")
    return 0 if answers else 1


if __name__ == "__main__":
    sys.exit(main())
