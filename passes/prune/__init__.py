"""Passes that take weights out of a model, and say so in its file."""
