"""Accuracy and speed of models by placement and budget, and the studies built on them."""
