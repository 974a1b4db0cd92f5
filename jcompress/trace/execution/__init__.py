"""Runs a function on compressed parameters without making them dense where there is a shorter way."""
