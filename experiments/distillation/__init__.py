"""Smaller networks that learn from larger ones."""
