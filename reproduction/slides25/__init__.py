"""Figures of the 2025 slides on low-rank structure in training and adaptation."""
