"""From a trained model to a faster program."""
