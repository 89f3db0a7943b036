"""Base weights of which an adapter has its own version, and who may read which."""
