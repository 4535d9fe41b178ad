"""PALM (arXiv 2210.10913) in JAX: a picture generator as a world, an agent that explores it, an
encoder that learns from it."""
