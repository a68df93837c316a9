"""What is said of a model when it is trained."""
