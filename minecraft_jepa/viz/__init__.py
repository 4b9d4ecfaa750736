"""Figures, GIFs and the drawn keyboard."""
