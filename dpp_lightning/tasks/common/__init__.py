"""What all tasks share."""
