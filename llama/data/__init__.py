"""From a row in a file to a packed batch: rows, templates, tokenizers, examples with labels, and the order of training.
"""
