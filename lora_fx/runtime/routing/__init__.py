"""Calls in which every sample of a batch has an adapter of its own."""
