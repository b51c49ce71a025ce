"""Figures of the 2025 overview of low-rank structure in training and adaptation."""
