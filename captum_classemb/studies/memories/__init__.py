"""What attention and MLP memories write, in terms of classes (Vilas et al. §5)."""
