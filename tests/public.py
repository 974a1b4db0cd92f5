"""The public face, read from it: rooms, names, objects, and what their docstrings lack."""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing

import jax

import jcompress as jc

# Rooms whose methods come from the literature: their docstrings name the paper.
LITERATURE = ("distill", "factorize", "nn", "prune", "quantize", "share")
# Plain ways, and protocols.
OF_NO_PAPER = (
    "prune.dynamic.Rule",
    "prune.dynamic.Static",
    "quantize.Float",
    "quantize.Table",
    "quantize.ranges.Fixed",
    "quantize.ranges.MSE",
    "quantize.ranges.MinMax",
    "quantize.ranges.Percentile",
)
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")


def _walk(path, module, found):
    found[path] = module
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            _walk(f"{path}.{name}".lstrip("."), value, found)
    return found


def rooms():
    """{path below jc: module}; a room is a module that the room above names in ``__all__``."""
    return _walk("", jc, {})


def objects():
    """{path: object} of all that is public, modules left out."""
    found = {}
    for room, module in rooms().items():
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType) and not name.startswith("__"):
                found[f"{room}.{name}".lstrip(".")] = value
    return found


def sections(doc):
    """{section: its text}, and "" for what stands before the first."""
    parts = re.split(rf"^({'|'.join(SECTIONS)})s?:$", inspect.cleandoc(doc or ""), flags=re.M)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def documented(value):
    """Whether an object has a docstring of its own: functions and classes; an alias of a type has none."""
    return inspect.isfunction(value) or inspect.isclass(value) or isinstance(value, jax.custom_vjp | jax.custom_jvp)


def is_method(path, value):
    """Whether it gives a node for an array."""
    return inspect.isclass(value) and "__call__" in vars(value) and path.split(".")[0] in LITERATURE


def _named(text):
    return set(re.findall(r"^  (?:  )?\**`{0,2}(\w+)", text, re.M)) | {
        name for row in re.findall(r"^  (?:  )?([\w, *`]+):", text, re.M) for name in re.findall(r"\w+", row)
    }


def _fields(cls):
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls) if field.init and not field.name.startswith("_")]
    return list(getattr(cls, "_fields", ()))


def _raises(value):
    """Whether what the caller calls raises in its own body; a loop's StopIteration and the protocol do not count."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    bodies = [tree]
    if isinstance(tree, ast.ClassDef):
        called = ("__init__", "__post_init__", "__call__", "fit", "check")
        bodies = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in called]
    return any(isinstance(node, ast.Raise) and node.exc is not None for body in bodies for node in ast.walk(body))


def parameters(value):
    """The names of what a function or a class takes; an error's are the base class's own."""
    return () if isinstance(value, type) and issubclass(value, Exception) else inspect.signature(value).parameters


def gaps(path, value):
    """What the docstring of a public object lacks, as a set of words."""
    doc = value.__doc__ or ""
    parts, found = sections(doc), set()
    if not doc.strip() or len(doc.strip().splitlines()[0]) > 120 or doc.startswith(f"{path.split('.')[-1]}("):
        found.add("line")
    if ">>>" not in parts.get("Example", ""):
        found.add("example")
    is_class = inspect.isclass(value)
    if is_class:
        named = _named(parts.get("Attributes", "") + parts.get("Args", ""))
        found |= {f"attribute {name}" for name in _fields(value) if name not in named}
    elif callable(value):
        named = _named(parts.get("Args", ""))
        found |= {f"argument {name}" for name in parameters(value) if name not in named and name[0] != "_"}
        hints = inspect.signature(value).return_annotation
        if hints not in (None, "None", typing.NoReturn) and "Returns" not in parts:
            found.add("returns")
    if callable(value) and _raises(value) and "Raises" not in parts:
        found.add("raises")
    if is_method(path, value) and path not in OF_NO_PAPER and not re.search(r"\b(19|20)\d\d\b|\b\d{4}\.\d{5}\b", doc):
        found.add("paper")
    return found
