"""The methods of a compiled model, by what they are for."""
