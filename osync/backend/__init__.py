"""What a node fronts: an Ollama, or the embedded engine."""
