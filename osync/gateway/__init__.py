"""The proxy role: Ollama, OpenAI and Anthropic HTTP APIs over the cluster's nodes."""
