"""Flags of a command: ``--data_dir``, ``--workdir``, ``--overwrite``, and ``--config.<field>=<value>``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Complains in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {' '.join(message.split())}; see --help", file=sys.stderr)
        sys.exit(2)


def positive(text: str) -> int:
    """A whole number above zero, for ``add_argument(type=...)``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be positive")
    return value


def parser(doc: str | None, workdir: str) -> Parser:
    """The flags that all experiments have.

    Args:
      doc: the docstring of the command, for the help.
      workdir: where it writes by default, in words.
    """
    found = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    found.add_argument("--data_dir", help="folder with the files of the data, where it is not embedded")
    found.add_argument("--workdir", help=f"where to write; {workdir} by default")
    found.add_argument("--overwrite", action="store_true", help="delete what an earlier run wrote to the workdir")
    return found


FOLDERS = ("data_dir", "workdir", "overwrite")


def told(module: str, parser: Parser, args: argparse.Namespace) -> str:
    """The command for a record: what is not default, without folders."""
    given = {name: x for name, x in vars(args).items() if name not in FOLDERS and x != parser.get_default(name)}
    flags = (f"--{name}" if x is True else f"--{name}={x}" for name, x in given.items())
    return shlex.join(["python", "-m", module, *flags])


def parse(
    parser: Parser, configs: Callable[[str], Any], argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Any]:
    """The flags, and the config with what ``--config.<field>=<value>`` changes.

    Args:
      parser: see :func:`parser`.
      configs: from the name of the data to the config, a dataclass; it raises ``LookupError`` for a name it does not
        know. ``--config=<file>`` takes that of the file's ``get_config()`` instead.
      argv: the command line.
    """
    rest, changes = _split(sys.argv[1:] if argv is None else argv)
    file, named = changes.pop("", None), changes.get("data", "digits")
    default = configs("digits")
    fields = "\n".join(f"  --config.{f.name}={_shown(getattr(default, f.name))}" for f in dataclasses.fields(default))
    parser.epilog = f"config, from --config=<file with get_config()> or that of --config.data:\n{fields}"
    args = parser.parse_args(rest)
    try:
        config = _of_data(configs, named, default) if file is None else from_file(file)
        for path, text in changes.items():
            config = changed(config, path.split("."), text, f"config.{path}")
    except ValueError as error:
        parser.error(str(error))
    return args, config


def _of_data(configs: Callable[[str], Any], name: str, default: Any) -> Any:
    try:
        return configs(name)
    except LookupError:
        return default


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The flags that are no ``--config``, and what those that are say, by field; ``""`` for the config's file."""
    rest, changes = [], {}
    items: Iterator[str] = iter(argv)
    for item in items:
        name, equals, value = item.partition("=")
        flag = name.lstrip("-")
        if name.startswith("-") and (flag == "config" or flag.startswith("config.")):
            changes[flag[len("config.") :]] = value if equals else next(items, "")
        else:
            rest.append(item)
    return rest, changes


def from_file(path: str) -> Any:
    """What ``get_config()`` of a Python file gives.

    Raises:
      ValueError: if there is no such file, or it does not run.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config={path}: no such file")
    try:
        return runpy.run_path(path)["get_config"]()
    except KeyError:
        raise ValueError(f"--config={path}: has no function get_config()") from None
    except Exception as error:  # whatever a file of the user's may raise
        raise ValueError(f"--config={path}: {type(error).__name__}: {error}") from error


def changed(config: Any, path: Sequence[str], text: str, flag: str) -> Any:
    """The config with one field set, a copy.

    Args:
      config: a dataclass, or within one a dictionary of options, which takes new names.
      path: the field, and the names in dictionaries below it.
      text: the value as typed.
      flag: for messages.

    Raises:
      ValueError: for a field there is not, or a value of another type.
    """
    name, *rest = path
    if isinstance(config, dict):
        value = changed(config.get(name, {}), rest, text, flag) if rest else _literal(text)
        return {**config, name: value}
    if not dataclasses.is_dataclass(config):
        raise ValueError(f"--{flag}: config has no such field")
    known = [f.name for f in dataclasses.fields(config)]
    if name not in known:
        raise ValueError(f"--{flag}: config has no field {name!r}; it has {', '.join(known)}")
    old = getattr(config, name)
    value = changed(old, rest, text, flag) if rest else _parsed(old, text, flag)
    return dataclasses.replace(config, **{name: value})  # type: ignore[type-var]


def _parsed(old: Any, text: str, flag: str) -> Any:
    """The text as a value of the type of the old one."""
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(old, str):
            return text
        if isinstance(old, (int, float)):
            return type(old)(text)
        if isinstance(old, tuple):
            return _tuple(old, text)
        if isinstance(old, dict):
            return {**ast.literal_eval(text)}
    except (ValueError, KeyError, SyntaxError, TypeError):
        pass
    raise ValueError(f"--{flag}={text}: expected a value such as {_shown(old)}")


def _tuple(old: tuple, text: str) -> tuple:
    found = _literal(text)
    values = found if isinstance(found, (tuple, list)) else [x.strip() for x in text.split(",") if x.strip()]
    if not old:
        return tuple(values)
    if not isinstance(old[0], (str, int, float)):
        raise ValueError("what is no text or number cannot be typed")
    return tuple(type(old[0])(x) for x in values)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(getattr(x, "name", x)) for x in value)
    return str(value)
