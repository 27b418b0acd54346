"""Layers of torch.nn that hold several virtual weights."""
