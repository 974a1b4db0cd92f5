"""The command ``jcompress``: what files hold, plans tried on shapes, compression from file to file, exports."""

from jcompress_command import main

__all__ = ["main"]
