"""Public Python clients, for asyncio and for plain code. They share all but I/O."""
