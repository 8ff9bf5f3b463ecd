"""What MLPs read and write, captured from a frozen model."""
