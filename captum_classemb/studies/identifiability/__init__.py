"""Class identifiability of tokens by block (Vilas et al. §4)."""
