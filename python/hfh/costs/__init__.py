"""What a model costs, counted."""
