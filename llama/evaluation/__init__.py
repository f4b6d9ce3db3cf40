"""How good a model is, measured on examples that it was not trained on."""
