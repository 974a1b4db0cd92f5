"""Runs data through a function and records what each parameter meets."""
