"""Image tokens whose attention is cut off (Vilas et al. §4.2)."""
