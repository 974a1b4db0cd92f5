# PYTHON_ARGCOMPLETE_OK
"""The command ``jcompress``: its parser, and what becomes of errors: one sentence, and an exit status.

It lies beside the package, not in it, so that help, completion and wrong arguments need no JAX.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

SAME, DIFFERENT, FAILED, INTERRUPTED = 0, 1, 2, 130

_SOURCE = "a safetensors file or folder, a GGUF file, an Orbax checkpoint or a file of jc.save"
_PLAN = "a plan: a YAML or JSON file of rules, or a Python file that defines them"
_LAYOUT = (
    "what the axes of kernels are: in-out, out-in as Hugging Face and GGUF have them, or by the file (auto, the "
    "default: GGUF and files of PyTorch are out-in); the layouts of a plan go first"
)
_EPILOG = """exit status: 0 if all went well, 1 if diff found a difference, 2 for an error, told in one sentence,
130 if interrupted. Shell completion: pip install argcomplete, then
  eval "$(register-python-argcomplete jcompress)"."""


def parser() -> argparse.ArgumentParser:
    """All that the command takes."""
    top = argparse.ArgumentParser(
        prog="jcompress",
        description="Compress the parameters of neural networks from file to file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _inspect(commands)
    _plan(commands)
    _compress(commands)
    _compare(commands)
    _export(commands)
    return top


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")


def _inspect(commands: Any) -> None:
    found = _command(commands, "inspect", "show what files hold")
    found.add_argument("files", nargs="+", metavar="FILE", help=_SOURCE)
    found.add_argument("--json", action="store_true", help="one JSON object a file")


def _plan(commands: Any) -> None:
    found = _command(commands, "plan", "show what a plan would make of a file, from shapes alone; nothing is written")
    found.add_argument("source", metavar="SOURCE", help=_SOURCE)
    _planned(found)


def _compress(commands: Any) -> None:
    found = _command(commands, "compress", "compress a file by a plan, array by array; goes on if it was interrupted")
    found.add_argument("source", metavar="SOURCE", help=_SOURCE)
    _planned(found)
    found.add_argument("--output", "-o", required=True, metavar="FILE", help="the file to write")
    found.add_argument("--coded", action="store_true", help="entropy-code it (the extra jcompress[coded])")
    found.add_argument("--seed", type=int, metavar="N", help="for methods that draw random numbers")
    found.add_argument("--step", type=int, metavar="N", help="the step at which schedules are read")
    found.add_argument("--quiet", "-q", action="store_true", help="no progress, no summary")


def _planned(found: argparse.ArgumentParser) -> None:
    found.add_argument("--plan", "-p", required=True, metavar="PLAN", help=_PLAN)
    found.add_argument("--layout", choices=("auto", "in-out", "out-in"), default="auto", help=_LAYOUT)


def _compare(commands: Any) -> None:
    found = _command(commands, "diff", "show by how much the arrays of two files differ")
    found.add_argument("before", metavar="BEFORE", help=_SOURCE)
    found.add_argument("after", metavar="AFTER", help="another")
    found.add_argument(
        "--tolerance", type=float, default=0.0, metavar="ERROR", help="relative error that is no difference"
    )
    found = _command(commands, "report", "show what each parameter takes after compression, and what it lost")
    found.add_argument("before", metavar="BEFORE", help=_SOURCE)
    found.add_argument("after", metavar="AFTER", help="a file of jc.save, made of it")


def _export(commands: Any) -> None:
    found = _command(commands, "export", "write a file that other programs read")
    found.add_argument("source", metavar="SOURCE", help="a file of jc.save, or any other that inspect shows")
    found.add_argument("--output", "-o", required=True, metavar="PATH", help="the file or folder to write")
    formats = ("safetensors", "compressed-tensors", "gguf")
    found.add_argument("--to", required=True, choices=formats, help="the format; safetensors holds dense arrays")
    found.add_argument(
        "--like", metavar="ORIGINAL", help="the model it was made of: its metadata and other files go along"
    )
    found.add_argument(
        "--kind", metavar="KIND", help="how GGUF keeps dense kernels: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K"
    )
    found.add_argument("--layout", choices=("in-out", "out-in"), default="out-in", help="of the kernels of the source")


_PLACES = {
    "inspect": "listing",
    "plan": "planning",
    "compress": "planning",
    "diff": "comparing",
    "report": "comparing",
    "export": "exporting",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    top = parser()
    if "_ARGCOMPLETE" in os.environ:
        importlib.import_module("argcomplete").autocomplete(top)
    given = top.parse_args(arguments)
    run = getattr(importlib.import_module(f"jcompress.cli.{_PLACES[given.command]}"), given.command)
    try:
        status = run(given)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        say_error(f"interrupted{'; the same command goes on where it was' if given.command == 'compress' else ''}")
        return INTERRUPTED
    except BrokenPipeError:  # as of `jcompress inspect model | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SAME
    except (ValueError, OSError, ImportError, MemoryError) as error:
        say_error(str(error) or type(error).__name__)
        return FAILED


def say(text: str) -> None:
    """Print without what a terminal would obey."""
    sys.stdout.write(plain(text) + "\n")


def say_error(text: str) -> None:
    """The same, as one line of the other stream."""
    sys.stderr.write(plain(" ".join(text.split("\n"))) + "\n")


def plain(text: str) -> str:
    """The text with control characters and surrogates spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows in columns; those named stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pairs = [[(x, width, i) for i, (x, width) in enumerate(zip(row, widths, strict=True))] for row in rows]
    return "\n".join("  ".join(x.rjust(n) if i in right else x.ljust(n) for x, n, i in row).rstrip() for row in pairs)
