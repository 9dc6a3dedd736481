"""How every command of this project reads its command line and its YAML files, reports mistakes, and ends.

A command is a dataclass and a function:

    @dataclass
    class VerifyOptions:
        \"\"\"Read a whole dataset and compare it with its manifest.\"\"\"

        directory: str = positional("DIR")
        \"\"\"A prepared dataset.\"\"\"
        workers: int = ranged(2, at_least=1)
        \"\"\"Files read at a time.\"\"\"

    def main(argv: list[str] | None = None) -> int:
        return run(Program("python -m data_pipeline.verify"), VerifyOptions, verify, argv)

The class's docstring and the strings below the fields are the help. `--config FILE` reads fields from YAML, and
`--print_config` prints what such a file would hold. What comes later on the command line wins. The work is done by
jsonargparse; spelling.py adds what people type but it does not know: bare flags, positional words, repeated options.
"""

from data_pipeline.command_line.options import option, positional
from data_pipeline.command_line.parser import new_parser, parse, parse_with, show_ranges
from data_pipeline.command_line.program import MISTAKE, Program, print_line, run, run_verb
from data_pipeline.command_line.ranges import Range, check_ranges, ranged, ranged_like, ranges_of
from data_pipeline.command_line.split import split_arguments

__all__ = [
    "MISTAKE",
    "Program",
    "Range",
    "check_ranges",
    "new_parser",
    "option",
    "parse",
    "parse_with",
    "positional",
    "print_line",
    "ranged",
    "ranged_like",
    "ranges_of",
    "run",
    "run_verb",
    "show_ranges",
    "split_arguments",
]
