"""A Mixture-of-Experts language model in plain PyTorch; it knows no recorder and no trainer.

Importing the package loads nothing heavy; `model.config` and `model.presets` need no torch, `model.lm` does.
"""
