"""Files of weights: pretrained folders, adapters, checkpoints. What is on disk under its name is whole.

These files know names and tensors; they know nothing of optimizers or runs.
"""
