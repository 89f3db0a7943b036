"""Merging into a checkpoint on the disk, tensor by tensor, without loading the model."""
