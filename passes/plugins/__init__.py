"""Passes that run code of the user's own."""
