"""`python -m benchmarks`: list what can be measured, run it, compare two runs, report.

python -m benchmarks list --op 'selective*'
python -m benchmarks run --op rms_norm --out mine.json
python -m benchmarks compare before.json after.json
python -m benchmarks report
"""

import argparse
import importlib
import os
import select
import sys

COMMANDS = {
    "list": "ops, layers and models, their shapes and providers",
    "run": "check every provider against float64, then time it",
    "compare": "two result files or two revisions, noise aware",
    "report": "tables and figures from the committed results",
}

PIPE_CLOSED = 128 + 13  # what a shell reports of a process that SIGPIPE has ended


def main(argv: list[str] | None = None) -> int:
    """Run one command; its module is imported only when it is asked for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    asked = next((word for word in (sys.argv[1:] if argv is None else argv) if word in COMMANDS), None)
    for name, what in COMMANDS.items():
        sub = commands.add_parser(name, help=what, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == asked:
            module = importlib.import_module(f".{'listing' if name == 'list' else name}", __package__)
            sub.description = module.__doc__
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        if not reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return PIPE_CLOSED
    return status


def reader_left() -> bool:
    """Whether nobody reads any more what is printed."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    return bool(watch.poll(0))


if __name__ == "__main__":
    sys.exit(main())
