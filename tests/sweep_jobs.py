"""Jobs that workers of other processes import; they need no JAX."""

import os
from pathlib import Path


def rows(name, value):
    return [{"name": name, "value": value}]


def counted(folder, name):
    """Fails the first time that it is called, works the second time."""
    place = Path(folder) / f"{name}.calls"
    with place.open("a") as file:
        file.write("x")
    if name == "fails" and len(place.read_text()) == 1:
        raise ArithmeticError("no luck")
    return rows(name, 1)


def dies(folder):
    """Takes its process with it the first time."""
    place = Path(folder) / "died"
    if not place.exists():
        place.write_text("")
        os._exit(9)
    return rows("dies", 2)
