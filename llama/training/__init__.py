"""One training run: its settings, what the ranks agree on, its optimizer, and what it reports."""
