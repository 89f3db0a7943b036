"""The parts of a model that are compiled, and what lets one graph serve many calls."""
