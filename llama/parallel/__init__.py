"""Several processes, and what each holds of a model. Everything is applied from outside: no model knows of it."""
