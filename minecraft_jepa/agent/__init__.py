"""Tasks in the game whose goal is a picture, and agents that try to reach them."""
