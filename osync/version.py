"""The version of osync, and of the API that it speaks: the one place that states them."""

__version__ = "0.1.0"

OLLAMA_API = "0.33.0"
"""The version of Ollama's API that osync itself speaks; clients turn features on by it."""
