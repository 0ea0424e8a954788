"""Compares formulas for rewards_math.py, in a process of its own: a formula can keep a processor busy for hours
(`9^9^9^9`), in code that no signal handler and no thread gets to interrupt."""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

SECONDS = 2.0  # of processor time for one pair; then the kernel ends this process
MEMORY = 2 * 2**30  # bytes


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)  # that its own timeouts are off
    from math_verify import LatexExtractionConfig, parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        gold, given = (parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in json.loads(line))
        equal = bool(gold and given) and verify(gold, given, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(equal)), flush=True)


if __name__ == "__main__":
    main()
