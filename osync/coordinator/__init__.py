"""Drives sequences through the stages of a model."""
