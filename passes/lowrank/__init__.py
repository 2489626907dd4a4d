"""Layers split into products of smaller ones."""
