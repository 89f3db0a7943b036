"""Rules: what a statement of a spec asks of the graph."""
