"""From a prompt to text: a cache of keys and values, scores, choices, beams, and a batch of sequences that grow."""
