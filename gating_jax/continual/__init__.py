"""Continual learning: task-gated networks, baselines, and the metrics for both."""
