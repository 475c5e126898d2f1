"""What a benchmark says of itself before it measures anything: what it is for, and how long it takes."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter


def parser(name: str, text: str | None, *, takes: str) -> ArgumentParser:
    """The arguments of `python -m benchmarks.NAME`, whose module says what it measures; others exit 2."""
    return ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=text,
        epilog=f"It takes {takes}.",
        formatter_class=RawDescriptionHelpFormatter,
    )
