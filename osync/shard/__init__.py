"""The shard role: holds stages of models for coordinators, and evaluates frames."""
