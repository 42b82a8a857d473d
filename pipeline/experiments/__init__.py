"""Ready experiment files; ``python -m pipeline.launch experiments`` lists them."""
