"""Composition root and lifecycle of osyncd."""
