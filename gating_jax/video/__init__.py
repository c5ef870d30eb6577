"""The programme for long videos: its networks, training, test, scores and report."""
