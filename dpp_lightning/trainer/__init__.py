"""What this package adds to Lightning's Trainer: strategies, checkpoints, and the end of a run that was stopped."""
