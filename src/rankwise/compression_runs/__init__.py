"""Runs of ``rankwise compress``: what was asked for, the model and its data, scores before and after, the folder it fills.

Import from its modules: ``settings`` is light, the others bring PyTorch and transformers.
"""
