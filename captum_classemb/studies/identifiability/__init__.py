"""Which classes tokens stand for, block by block (Vilas et al. §4)."""
