"""The node role: one backend, offered to proxies."""
