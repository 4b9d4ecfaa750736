"""Search for the actions that lead to a goal, in the model alone."""
