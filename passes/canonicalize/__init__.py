"""Rewrites that make a graph plain: what is dead goes, what is equal becomes the same."""
